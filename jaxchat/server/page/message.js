/** One message on the page: its text, its tool calls, what can be done with it, what went wrong. */

import { ADVICE } from "./api.js";
import { textOf, versionIndex, versions } from "./conversation.js";
import { byId, focusPrompt, h, icon, iconButton, isOfInputMethod } from "./dom.js";
import { Prose } from "./markdown.js";
import { drawTokens, tokensShown } from "./tokens.js";

const FINISHES = {
  length: "Ended at the longest answer that the settings allow.",
  context: "Ended because the model can hold no more: its context is full.",
};

/** The setting that helps against each kind of failure. */
const REMEDIES = { auth: "apiKey", settings: "system" };

export class MessageView {
  #parts = [];
  #editor = null;
  #showsTokens = false;
  #seen;

  /** `seen(view)` is called when the view wants to know that it comes near the screen. */
  constructor(message, session, watch) {
    Object.assign(this, { message, session });
    this.body = h("div", { class: "body" });
    this.status = h("div", { class: "status" });
    this.actions = h("div", { class: "actions" });
    const who = message.role === "user" ? "You" : "Answer";
    this.name = h("p", { class: "name", hidden: true });
    this.element = h("article", { class: `message ${message.role}`, dataset: { id: message.id }, aria: { label: who } },
      this.name, this.body, this.status, this.actions);
    this.#seen = watch(this);
  }

  /** Draw the message as it is now. `conversation` tells its place among its alternatives. */
  update(message, conversation) {
    this.message = message;
    this.element.classList.toggle("streaming", message.status === "streaming");
    this.element.setAttribute("aria-busy", String(message.status === "streaming"));
    this.name.hidden = !message.group;
    this.name.textContent = message.model ?? "";
    if (!this.#editor) this.drawBody();
    this.#drawStatus();
    this.#drawActions(conversation);
  }

  /** Draw only what grows while an answer streams. */
  drawBody() {
    const { message } = this;
    if (message.role === "user") {
      this.body.replaceChildren(h("div", { class: "bubble", dir: "auto" }, textOf(message)));
    } else if (this.#showsTokens && tokensShown(message)) {
      this.#parts = [];
      this.body.replaceChildren(drawTokens(message.tokens));
    } else {
      this.#drawParts();
    }
  }

  /** Text and cards of tool calls, in order; what is already drawn is only brought up to date. */
  #drawParts() {
    const blocks = blocksOf(this.message);
    if (blocks.length === 0) blocks.push({ type: "text", text: "" });
    if (this.#parts.length === 0) this.body.replaceChildren();
    blocks.forEach((block, index) => {
      if (this.#parts[index]?.type !== block.type) {
        this.#parts[index]?.element.remove();
        this.#parts[index] = block.type === "text" ? new TextPart() : new ToolPart();
        this.body.insertBefore(this.#parts[index].element, this.body.children[index] ?? null);
      }
      const part = this.#parts[index];
      this.#seen.then(() => part.show(block));
      if (this.message.status !== "streaming") part.showSoon?.(block);
    });
    for (const part of this.#parts.splice(blocks.length)) part.element.remove();
  }

  #drawStatus() {
    const { message, session } = this;
    const lines = [];
    if (session.isWaiting(message.id)) lines.push(h("p", { class: "note" }, ADVICE.starting));
    if (message.status === "failed") lines.push(drawError(message, session));
    if (message.status === "stopped") lines.push(h("p", { class: "note" }, "Stopped."));
    if (isEmpty(message)) lines.push(h("p", { class: "note" }, "The model ended its answer before the first word."));
    if (FINISHES[message.finish]) lines.push(h("p", { class: "note" }, FINISHES[message.finish]));
    if (message.role === "assistant" && message.status !== "streaming" && message.stats) {
      lines.push(drawStats(message));
    }
    this.status.replaceChildren(...lines);
  }

  #drawActions(conversation) {
    const { message, session } = this;
    this.actions.hidden = message.status === "streaming" || this.#editor !== null;
    const focused = this.actions.contains(document.activeElement) ? document.activeElement.ariaLabel : null;
    const buttons = [...this.#versionButtons(conversation)];
    if (textOf(message)) buttons.push(iconButton("copy", "Copy", () => {}, { dataset: { action: "copy" } }));
    if (message.role === "user") buttons.push(iconButton("edit", "Edit", () => this.startEditing()));
    else if (message.status !== "failed") { // there the error has a button for it
      buttons.push(iconButton("retry", "Regenerate", () => leave(() => session.regenerate(message.id))));
    }
    if (message.tokens?.length) buttons.push(this.#tokenButton());
    buttons.push(iconButton("trash", "Delete", () => leave(() => session.deleteMessage(message.id))));
    this.actions.replaceChildren(...buttons);
    if (focused) buttons.flatMap((b) => [b, ...b.children]).find((b) => b.ariaLabel === focused)?.focus();
  }

  #versionButtons(conversation) {
    const all = versions(conversation, this.message.id);
    if (all.length < 2) return [];
    const at = versionIndex(conversation, this.message.id);
    const step = (by, label) => () => {
      const [{ id }] = all[at + by];
      this.session.select(id);
      focusIn(id, label);
    };
    return [
      h("span", { class: "versions", role: "group", aria: { label: "Alternatives" } },
        iconButton("previous", "Previous alternative", step(-1, "Previous alternative"), { disabled: at === 0 }),
        h("span", {}, `${at + 1}/${all.length}`),
        iconButton("next", "Next alternative", step(1, "Next alternative"), { disabled: at === all.length - 1 })),
    ];
  }

  #tokenButton() {
    const toggle = () => {
      this.#showsTokens = !this.#showsTokens;
      button.setAttribute("aria-pressed", String(this.#showsTokens));
      this.#parts = [];
      this.drawBody();
    };
    const button = iconButton("tokens", "Token view", toggle, { "aria-pressed": String(this.#showsTokens) });
    return button;
  }

  /** Replace the bubble by a box to edit the message in. */
  startEditing() {
    if (this.#editor) {
      this.#editor.querySelector("textarea").focus(); // what has been written stays
      return;
    }
    const box = h("textarea", {
      class: "edit-box", dir: "auto", value: textOf(this.message), aria: { label: "Edit your message" },
    });
    const end = () => {
      this.#editor = null;
      this.drawBody();
      this.actions.hidden = false;
    };
    const save = async () => {
      const text = box.value.trim();
      if (text && !(await this.session.haveModels())) return; // what was written stays
      end();
      if (text) this.session.edit(this.message.id, text);
      focusPrompt();
    };
    const cancel = () => {
      end();
      [...this.actions.children].find((button) => button.ariaLabel === "Edit")?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (isOfInputMethod(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        save();
      }
    });
    this.#editor = h("div", { class: "editor" }, box,
      h("div", { class: "editor-foot" },
        h("button", { class: "text-button", type: "button", onclick: cancel }, "Cancel"),
        h("button", { class: "solid-button", type: "button", onclick: save }, "Send")));
    this.body.replaceChildren(this.#editor);
    this.actions.hidden = true;
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
}

const isEmpty = ({ role, status, parts }) => role === "assistant" && !status && parts.length === 0;

/** Do what makes the button go away that was pressed. */
function leave(action) {
  action();
  focusPrompt();
}

/** After a change of alternatives: the same button of the message that took the place. */
function focusIn(id, label) {
  const selector = `[data-id="${CSS.escape(id)}"] .versions button:not(:disabled)`;
  const buttons = [...document.querySelectorAll(selector)];
  (buttons.find((button) => button.ariaLabel === label) ?? buttons[0]).focus();
}

class TextPart {
  type = "text";
  #prose = new Prose();
  element = this.#prose.element;

  show({ text }) {
    this.#prose.show(text);
  }

  /** Plain text keeps the place of what is not near the screen yet. */
  showSoon({ text }) {
    if (!this.element.hasChildNodes()) this.element.textContent = text;
    this.element.classList.toggle("plain", !this.element.children.length);
  }
}

class ToolPart {
  type = "tool";
  #call = h("code", {});
  #result = h("output", {});
  element = h("figure", { class: "tool", aria: { label: "Calculator" } },
    h("figcaption", {}, "Calculator"), this.#call, h("span", { class: "arrow", aria: { hidden: "true" } }, "→"), this.#result);

  show({ call, result }) {
    this.#call.textContent = call;
    this.#result.textContent = result;
  }
}

/** Parts as they are shown: a call and the output that follows it are one card. */
function blocksOf({ parts, status }) {
  const blocks = [];
  const noResult = status === "streaming" ? "…" : "no result";
  for (const { type, text } of parts) {
    if (type === "python") blocks.push({ type: "tool", call: text, result: noResult });
    else if (type === "python_output" && blocks.at(-1)?.type === "tool") blocks.at(-1).result = text;
    else blocks.push({ type: "text", text });
  }
  return blocks;
}

function drawStats({ stats, model, group }) {
  const { tokens, totalMs, firstMs } = stats;
  const speed = totalMs ? `${((1000 * tokens) / totalMs).toFixed(1)} tokens/s` : null;
  const count = `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  const facts = [group ? null : model, count, speed, `first after ${Math.round(firstMs)} ms`].filter(Boolean);
  return h("p", { class: "stats", title: "Tokens divided by the time from sending to the last one" },
    ...facts.flatMap((fact, index) => [index ? " · " : "", h("span", {}, fact)]));
}

function drawError(message, session) {
  const { id, error } = message;
  const wait = error.retryAfter ? ` It asks to wait ${error.retryAfter} s.` : "";
  const buttons = [];
  if (error.leaveOut) {
    const { leaveOut } = error;
    const label = `Retry without the first ${leaveOut === 1 ? "turn" : `${leaveOut} turns`}`;
    buttons.push(retryButton("solid-button", label, () => leave(() => session.retry(id, { leftOut: leaveOut }))));
  }
  const look = buttons.length ? "text-button" : "solid-button"; // what helps stands out
  const others = error.kind === "gone" ? session.modelsToRetry(message).join(", ") : "";
  buttons.push(retryButton(look, others ? `Retry with ${others}` : "Retry", () => leave(() => session.retry(id))));
  if (REMEDIES[error.kind]) {
    const open = () => openSettings(REMEDIES[error.kind]);
    buttons.push(h("button", { class: "text-button", type: "button", onclick: open }, "Open the settings"));
  }
  return h("div", { class: "error", role: "group", aria: { label: "Error" } },
    h("p", {}, `${ADVICE[error.kind] ?? ADVICE.server}${wait}`),
    h("p", { class: "error-detail" }, error.message),
    h("div", { class: "error-foot" }, ...buttons));
}

function openSettings(name) {
  byId("settings").showModal();
  byId(`setting-${name}`).focus();
}

const retryButton = (look, text, onclick) => h("button", { class: look, type: "button", onclick }, icon("retry"), text);
