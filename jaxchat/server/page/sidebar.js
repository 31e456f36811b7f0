/**
 * The list of conversations: open, search, rename, delete. On small screens it is a drawer; beside
 * the conversation it can be put away, and stays so.
 */

import { small } from "./database.js";
import { byId, h, iconButton, isOfInputMethod } from "./dom.js";

const SEARCH_MS = 120;

export class Sidebar {
  #drawing = 0;
  #searchTimer = null;

  constructor(session, database) {
    Object.assign(this, { session, database });
    this.list = byId("conversations");
    this.search = byId("search");
    session.addEventListener("list", () => this.draw());
    session.addEventListener("open", () => this.draw());
    database.addEventListener("change", () => this.draw());
    this.search.addEventListener("input", () => {
      clearTimeout(this.#searchTimer);
      this.#searchTimer = setTimeout(() => this.draw(), SEARCH_MS);
    });
    for (const button of ["new-chat", "new-chat-here"]) {
      byId(button).addEventListener("click", () => {
        this.closeDrawer();
        session.newChat();
      });
    }
    this.#drawer();
  }

  async draw() {
    const drawing = (this.#drawing += 1);
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = await this.database.find(words);
    if (drawing !== this.#drawing || this.list.querySelector("input")) return; // overtaken, or being renamed
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    this.list.replaceChildren(...found.map((conversation) => this.#item(conversation)));
    if (found.length === 0) this.list.append(h("li", { class: "none" }, words.length ? "Nothing found." : "No conversations yet."));
    if (focused) (this.list.querySelector(`[data-focus="${focused}"]`) ?? byId("new-chat")).focus();
  }

  #item({ id, title }) {
    const current = id === this.session.conversation.id;
    const link = h("a", { href: `#${id}`, class: "conversation", dataset: { focus: `open-${id}` } }, title);
    if (current) link.setAttribute("aria-current", "page");
    link.addEventListener("click", () => this.closeDrawer());
    const item = h("li", { class: this.session.isStreaming(id) ? "streaming" : "" }, link);
    item.append(
      iconButton("edit", `Rename ${title}`, () => this.#rename(item, id, title), { dataset: { focus: `rename-${id}` } }),
      iconButton("trash", `Delete ${title}`, () => this.#delete(id), { dataset: { focus: `delete-${id}` } }),
    );
    return item;
  }

  #rename(item, id, title) {
    const input = h("input", { value: title, maxLength: 200, aria: { label: "Title" } });
    let open = true;
    const close = async (save) => {
      if (!open) return;
      open = false;
      const value = input.value;
      input.remove();
      if (save) await this.session.rename(id, value);
      await this.draw();
      this.list.querySelector(`[data-focus="rename-${id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (isOfInputMethod(event)) return;
      if (event.key === "Enter") close(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        close(false);
      }
    });
    input.addEventListener("blur", () => close(true));
    item.replaceChildren(input);
    input.select();
  }

  async #delete(id) {
    await this.session.deleteConversation(id);
    if (!this.list.contains(document.activeElement)) byId("new-chat").focus();
  }

  // --- whether it is there --------------------------------------------------------------------

  #drawer() {
    this.narrow = matchMedia("(max-width: 760px)");
    this.narrow.addEventListener("change", () => this.closeDrawer());
    byId("open-sidebar").addEventListener("click", () => this.#open());
    byId("close-sidebar").addEventListener("click", () => this.closeDrawer() || this.#putAway(true));
    byId("backdrop").addEventListener("click", () => this.closeDrawer());
    this.closeDrawer();
  }

  #open() {
    if (this.narrow.matches) this.#setDrawer(true);
    else this.#putAway(false);
    byId("close-sidebar").focus();
  }

  #putAway(away) {
    document.documentElement.classList.toggle("side-away", away); // theme.js does so when the page opens
    small.set("sideAway", away || null);
    if (away) byId("open-sidebar").focus();
  }

  /** Whether it was open. */
  closeDrawer() {
    const wasOpen = document.body.classList.contains("drawer-open");
    this.#setDrawer(false);
    if (wasOpen) byId("open-sidebar").focus();
    return wasOpen;
  }

  #setDrawer(open) {
    document.body.classList.toggle("drawer-open", open);
    byId("backdrop").hidden = !open;
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    byId("sidebar").inert = this.narrow.matches && !open; // out of sight is out of reach
    byId("app").inert = open;
  }

  /** Put the focus into the search field, wherever it is. */
  startSearch() {
    this.#open();
    this.search.select();
  }
}
