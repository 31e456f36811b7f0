/** The stage picker: which models answer, one or several side by side. */

import { continuesText, listModels, standIn } from "./api.js";
import { small } from "./database.js";
import { byId, h } from "./dom.js";

export class ModelPicker {
  #models = [];

  constructor(session, settings) {
    Object.assign(this, { session, settings });
    this.several = byId("side-by-side");
    this.several.addEventListener("change", () => {
      if (!this.several.checked) this.#choose(session.models.slice(0, 1));
      this.#draw();
    });
  }

  /** Ask the server what it has. This tab's choice, or that of last time, holds where its stages still exist. */
  async load() {
    this.#models = await listModels(this.settings.values.apiKey);
    const ids = this.#models.map(({ id }) => id);
    this.session.available = ids;
    this.settings.setDefaults(this.#models[0]?.defaults ?? {}); // the same for all that a server has
    const kept = this.session.models.length ? this.session.models : small.get("models");
    const before = new Set((Array.isArray(kept) ? kept : []).map((id) => standIn(String(id), ids)).filter(Boolean));
    const preferred = this.#models.findLast(({ stage }) => stage === "sft") ?? this.#models.at(-1);
    this.#choose(before.size ? [...before] : preferred ? [preferred.id] : []);
    this.several.checked = this.session.models.length > 1;
    byId("models").hidden = ids.length === 0;
    byId("models").classList.toggle("single", ids.length < 2);
    this.#draw();
  }

  #choose(ids) {
    this.session.chooseModels(ids);
    small.set("models", ids);
    byId("model-name").textContent = ids.length > 1 ? `${ids.length} models` : ids.join("");
    byId("models").title = ids.join(", ");
    const begins = ids.length && ids.every(continuesText); // who knows no turns knows no questions
    byId("prompt").placeholder = begins ? "The beginning of a text" : "Ask anything";
  }

  #draw() {
    const type = this.several.checked ? "checkbox" : "radio";
    const rows = this.#models.map(({ id }) => {
      const input = h("input", { type, name: "model", value: id, checked: this.session.models.includes(id) });
      input.addEventListener("change", () => this.#changed(input));
      return h("label", {}, input, id);
    });
    byId("model-choices").replaceChildren(...rows);
  }

  #changed(input) {
    const checked = [...byId("model-choices").querySelectorAll("input:checked")].map(({ value }) => value);
    if (checked.length === 0) input.checked = true; // someone has to answer
    else this.#choose(checked);
  }
}
