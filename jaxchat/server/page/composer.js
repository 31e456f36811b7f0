/** The box that messages are written in: keys, commands, its draft, and the button that stops. */

import { explainNoCommand, isCommand, isNoCommand, runCommand } from "./commands.js";
import { small } from "./database.js";
import { byId, focusPrompt, isOfInputMethod } from "./dom.js";

const DRAFT_MS = 200;

export class Composer {
  #draftTimer = null;

  /** `notice(text, { rows })` tells the reader something. */
  constructor(session, settings, thread, notice) {
    Object.assign(this, { session, settings, thread, notice });
    this.box = byId("prompt");
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("input", () => this.#changed());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.#stop());
    session.addEventListener("open", () => this.#open());
    session.addEventListener("change", () => this.#drawButtons());
    session.addEventListener("finish", () => this.#drawButtons());
    addEventListener("pagehide", () => this.#keepDraft());
  }

  #open() {
    this.#keepDraft();
    const early = this.draftName ? "" : this.box.value; // written before the page had come to life
    this.draftName = this.#nameOfDraft();
    this.box.value = early || (small.get(this.draftName) ?? "");
    this.#fit();
    this.#drawButtons();
    focusPrompt();
  }

  /** A chat that holds nothing yet shares one draft with all others like it. */
  #nameOfDraft() {
    const { conversation } = this.session;
    return `draft.${conversation.children.length ? conversation.id : "new"}`;
  }

  #changed() {
    this.#fit();
    this.#drawButtons();
    clearTimeout(this.#draftTimer);
    this.#draftTimer = setTimeout(() => this.#keepDraft(), DRAFT_MS);
  }

  #keepDraft() {
    clearTimeout(this.#draftTimer);
    if (this.draftName) small.set(this.draftName, this.box.value);
  }

  #key(event) {
    if (isOfInputMethod(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && this.box.value === "") {
      if (this.thread.editLast()) event.preventDefault();
    }
  }

  async #send() {
    const text = this.box.value.trim();
    if (!text || this.session.streaming) return;
    if (isCommand(text)) {
      this.#clear();
      const newChat = () => this.session.newChat();
      this.#tell(runCommand(text, { settings: this.settings, newChat }));
      return;
    }
    if (isNoCommand(text)) {
      this.#tell(explainNoCommand(text)); // what was written stays
      return;
    }
    const { conversation } = this.session;
    if (!(await this.session.haveModels())) return;
    const changed = this.box.value.trim() !== text || this.session.conversation !== conversation;
    if (changed || this.session.streaming) return; // while the server was asked for its models
    this.#clear();
    this.session.ask(text);
    this.draftName = this.#nameOfDraft();
    this.thread.toEnd();
  }

  #tell({ text, rows }) {
    this.notice(text, { rows });
  }

  #clear() {
    this.box.value = "";
    this.#keepDraft();
    this.#fit();
    this.#drawButtons();
  }

  #stop() {
    this.session.stop();
    focusPrompt();
  }

  #drawButtons() {
    const { streaming } = this.session;
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = streaming;
    byId("stop").hidden = !streaming;
    byId("send").disabled = !this.box.value.trim();
    if (hadFocus) focusPrompt();
  }

  /** As high as its text; controls.css sets the limit. */
  #fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight}px`;
  }
}
