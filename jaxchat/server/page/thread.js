/** The messages of the open conversation, kept in step with it; scrolling that follows an answer. */

import { groupOf, leftOut, path, textOf, withoutTurns } from "./conversation.js";
import { byId, confirmCopied, h } from "./dom.js";
import { MessageView } from "./message.js";
import { hideCard } from "./tokens.js";

/** Distance from the end, in pixels, at which the reader counts as being there. */
const NEAR_END = 32;

/** Messages this far outside the screen are made ready. */
const MARGIN = "1200px";

export class Thread {
  #views = new Map();
  #following = true;
  #top = 0;
  #grown = new Set();
  #waiting = new WeakMap();
  #memoryStart = h("p", { class: "memory-start" });

  constructor(session) {
    this.session = session;
    this.element = byId("thread");
    this.scroller = byId("scroller");
    this.nearby = new IntersectionObserver((entries) => this.#notice(entries), { root: this.scroller, rootMargin: MARGIN });
    session.addEventListener("open", () => this.#open());
    session.addEventListener("change", () => this.draw());
    session.addEventListener("grow", ({ detail }) => this.#growSoon(detail));
    this.element.addEventListener("click", (event) => this.#clicked(event));
    this.#followScrolling();
  }

  #open() {
    this.nearby.disconnect();
    this.#views.clear();
    this.element.replaceChildren();
    this.#following = true;
    this.draw();
    this.toEnd();
  }

  /** Bring what is shown in step with the conversation. */
  draw() {
    hideCard();
    const { conversation } = this.session;
    const messages = path(conversation);
    const rows = messages.map((message) => this.#row(conversation, message));
    const shown = new Set(rows.flatMap(({ views }) => views));
    for (const [id, view] of this.#views) if (!shown.has(view)) this.#views.delete(id);
    this.#addMemoryStart(rows, messages);
    rows.forEach(({ element }, index) => {
      if (this.element.children[index] !== element) this.element.insertBefore(element, this.element.children[index] ?? null);
    });
    while (this.element.children.length > rows.length) this.element.lastElementChild.remove();
    this.element.classList.toggle("empty", rows.length === 0);
    if (rows.length === 0) this.element.append(h("p", { class: "welcome" }, "What shall we talk about?"));
    if (this.session.streaming) this.#followSoon();
  }

  /** A line where the model's memory begins, once the first turns have been left out. */
  #addMemoryStart(rows, messages) {
    const turns = leftOut(messages);
    if (!turns) return;
    const left = turns === 1 ? "The first turn no longer fits" : `The first ${turns} turns no longer fit`;
    this.#memoryStart.textContent = `${left}. The model remembers what follows.`;
    const start = messages.indexOf(withoutTurns(messages, turns)[0]);
    rows.splice(start, 0, { element: this.#memoryStart, views: [] });
  }

  /** A message, or several answers of a group in columns. */
  #row(conversation, message) {
    if (!message.group) {
      const view = this.#view(conversation, message);
      return { element: view.element, views: [view] };
    }
    const group = groupOf(conversation, message);
    const views = group.map((member) => this.#view(conversation, member));
    const existing = views[0].element.closest(".columns");
    const element = existing ?? h("div", { class: "columns", role: "group", aria: { label: "Answers side by side" } });
    const columns = views.map((view, index) => this.#column(view, group[index], message));
    element.replaceChildren(...columns);
    return { element, views };
  }

  #column(view, member, chosen) {
    const active = member.id === chosen.id;
    const choose = () => {
      this.session.select(member.id);
      this.#views.get(member.id).element.nextElementSibling.focus();
    };
    const button = h("button", { class: "text-button", type: "button", onclick: choose, aria: { pressed: String(active) },
      disabled: member.status === "streaming" }, active ? "Goes on from here" : "Go on from this one");
    return h("div", { class: `column ${active ? "active" : ""}` }, view.element, button);
  }

  #view(conversation, message) {
    if (!this.#views.has(message.id)) {
      this.#views.set(message.id, new MessageView(message, this.session, (view) => this.#watch(view)));
    }
    const view = this.#views.get(message.id);
    view.update(message, conversation);
    return view;
  }

  /** A promise that the view is near the screen: only then is its Markdown asked for. */
  #watch(view) {
    return new Promise((resolve) => {
      this.#waiting.set(view.element, resolve);
      this.nearby.observe(view.element);
    });
  }

  #notice(entries) {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      this.nearby.unobserve(target);
      this.#waiting.get(target)?.();
    }
  }

  /** However many tokens arrive, an answer is drawn once per frame. */
  #growSoon(message) {
    if (this.#grown.size === 0) requestAnimationFrame(() => this.#drawGrown());
    this.#grown.add(message.id);
  }

  #drawGrown() {
    for (const id of this.#grown) this.#views.get(id)?.drawBody();
    this.#grown.clear();
  }

  // --- scrolling ------------------------------------------------------------------------------

  #followScrolling() {
    const { scroller } = this;
    const button = byId("to-bottom");
    scroller.addEventListener("scroll", () => {
      const { scrollTop } = scroller;
      const left = scroller.scrollHeight - scrollTop - scroller.clientHeight;
      // only going up ends it: what grew since the last scroll must not look like a reader who left
      if (left < NEAR_END) this.#following = true;
      else if (scrollTop < this.#top) this.#following = false;
      this.#top = scrollTop;
      button.hidden = this.#following;
      hideCard();
    }, { passive: true });
    scroller.addEventListener("wheel", ({ deltaY }) => {
      if (deltaY < 0 && scroller.scrollTop > 0) this.#following = false;
    }, { passive: true });
    button.addEventListener("click", () => {
      this.toEnd();
      byId("prompt").focus();
    });
    new ResizeObserver(() => this.#followSoon()).observe(this.element);
    new ResizeObserver(() => {
      const bar = (scroller.offsetWidth - scroller.clientWidth) / 2;
      document.documentElement.style.setProperty("--bar", `${bar}px`);
      this.#followSoon();
    }).observe(scroller);
  }

  #followSoon() {
    if (!this.#following) return;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#top = this.scroller.scrollTop;
  }

  toEnd() {
    this.#following = true;
    this.#followSoon();
  }

  // --- clicks ---------------------------------------------------------------------------------

  async #clicked({ target }) {
    const button = target.closest("[data-action]");
    if (!button) return;
    const text = button.dataset.action === "copy"
      ? textOf(this.session.conversation.messages[button.closest(".message").dataset.id])
      : button.closest(".code").querySelector("pre").textContent;
    await copy(text);
    confirmCopied(button);
  }

  /** Edit the last message of the reader; false when there is none. */
  editLast() {
    const last = path(this.session.conversation).findLast((message) => message.role === "user");
    if (!last || this.session.streaming) return false;
    this.#views.get(last.id).startEditing();
    return true;
  }
}

/** The clipboard, or where the page is not served from localhost or by https an old way into it. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return;
  } catch {
    // not there, or not allowed
  }
  const box = h("textarea", { class: "visually-hidden", value: text });
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}
