/** The box that messages are written in: keys, commands, its draft, and the button that stops. */

import { isCommand, runCommand } from "./commands.js";
import { small } from "./database.js";
import { byId, focusPrompt } from "./dom.js";

const DRAFT_MS = 200;

export class Composer {
  #draftTimer = null;

  /** `announce(text)` tells the reader something; `loadModels()` asks for the models again. */
  constructor(session, settings, thread, { announce, loadModels }) {
    Object.assign(this, { session, settings, thread, announce, loadModels });
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
    this.draftName = this.#nameOfDraft();
    this.box.value = small.get(this.draftName) ?? "";
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
    if (event.isComposing) return; // Enter picks a word in an input method
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
      this.announce(runCommand(text, { settings: this.settings, newChat }));
      return;
    }
    if (this.session.models.length === 0) {
      await this.loadModels();
      if (this.session.models.length === 0) this.announce("The server has no model to ask.");
      else if (this.box.value.trim() === text) this.#send();
      return;
    }
    this.#clear();
    this.session.ask(text);
    this.draftName = this.#nameOfDraft();
    this.thread.toEnd();
  }

  #clear() {
    this.box.value = "";
    this.#keepDraft();
    this.#fit();
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
