/** The settings: their values and limits in one table, and the dialog that is drawn from it. */

import { small, storageKey, tabOnly } from "./database.js";
import { byId, h } from "./dom.js";

/**
 * One entry per setting. `step` makes it a number; `empty` is what an empty field means. Values that
 * the server takes by itself begin as null, until it has told them.
 */
const FIELDS = {
  system: { label: "System prompt", initial: "", rows: 3, hint: "Put before the first message." },
  temperature: { label: "Temperature", initial: null, min: 0, max: 2, step: 0.05, slider: true,
    hint: "0 always takes the most likely token." },
  topK: { label: "Top-k", initial: null, min: 0, max: 1000, step: 1, hint: "Tokens to choose from; 0 for all." },
  topP: { label: "Top-p", initial: 1, min: 0.01, max: 1, step: 0.01, slider: true,
    hint: "The most likely tokens that together have this probability." },
  maxTokens: { label: "Longest answer", initial: null, min: 1, max: 32768, step: 1, empty: null,
    hint: "In tokens; empty for as many as the context holds, or 128 of a base model." },
  seed: { label: "Seed", initial: null, min: 0, max: 2 ** 31 - 1, step: 1, empty: null,
    hint: "Empty for another one each time." },
  tokenView: { label: "Record token probabilities", initial: false, toggle: true,
    hint: "For the token view of the answers to come." },
  theme: { label: "Theme", initial: "auto", choices: { auto: "System", light: "Light", dark: "Dark" } },
  apiKey: { label: "API key", initial: "", secret: true, hint: "Where the server asks for one. Forgotten with the tab." },
};

export class Settings extends EventTarget {
  #chosen;
  #defaults = {};

  constructor() {
    super();
    this.#chosen = chosenBefore();
    addEventListener("storage", ({ key }) => {
      // drafts and the choice of models are stored there too; null: all has been cleared
      if (key === storageKey("settings") || key === null) this.#takeFromOtherTab();
    });
  }

  /** What the reader has set, else what the server takes, else what the page begins with. */
  get values() {
    return { ...initialValues(), ...this.#defaults, ...this.#chosen };
  }

  /** Set one value; throws RangeError, naming the limits, for one that is out of range. */
  set(name, value) {
    check(name, value);
    this.#chosen[name] = value;
    this.#keep();
    this.#announce(name);
  }

  /** Another tab has set something; the API key is this tab's own. */
  #takeFromOtherTab() {
    const before = this.values;
    const { apiKey } = before;
    this.#chosen = { ...chosenBefore(), apiKey };
    const now = this.values;
    for (const name of Object.keys(FIELDS)) if (now[name] !== before[name]) this.#announce(name);
  }

  reset() {
    this.#chosen = {};
    this.#keep();
    for (const name of Object.keys(FIELDS)) this.#announce(name);
  }

  /** The values that the server takes where a request has none; the page asks for the same. */
  setDefaults(values) {
    const names = Object.keys({ ...this.#defaults, ...values });
    this.#defaults = values;
    for (const name of names) this.#announce(name);
  }

  /** Store what the reader has set, and nothing else: a default is not a choice. */
  #keep() {
    const { apiKey = "", ...kept } = this.#chosen;
    small.set("settings", kept);
    tabOnly.set("apiKey", apiKey);
  }

  #announce(name) {
    if (name === "theme") applyTheme(this.values.theme);
    this.dispatchEvent(new CustomEvent("change", { detail: name }));
  }
}

function chosenBefore() {
  return { ...known(small.get("settings") ?? {}), apiKey: tabOnly.get("apiKey") ?? "" };
}

function initialValues() {
  return Object.fromEntries(Object.entries(FIELDS).map(([name, { initial }]) => [name, initial]));
}

/** The stored values that this version of the page knows and that are in range. */
function known(stored) {
  return Object.fromEntries(Object.entries(stored).filter(([name, value]) => {
    try {
      check(name, value);
      return true;
    } catch {
      return false;
    }
  }));
}

function check(name, value) {
  const field = FIELDS[name];
  if (!field) throw new RangeError(`there is no setting ${name}`);
  if (field.step === undefined) {
    const possible = field.choices ? value in field.choices : typeof value === typeof field.initial;
    if (!possible) throw new RangeError(`${field.label} cannot be ${value}`);
    return;
  }
  if (value === field.empty) return;
  const whole = field.step !== 1 || Number.isInteger(value);
  if (!Number.isFinite(value) || !whole || value < field.min || value > field.max) {
    const kind = field.step === 1 ? "a whole number" : "a number";
    throw new RangeError(`${field.label} is ${kind} from ${field.min} to ${field.max}`);
  }
}

export function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Draw the dialog's fields and keep them and the settings equal. */
export function settingsDialog(settings) {
  const dialog = byId("settings");
  const shows = {};
  for (const [name, field] of Object.entries(FIELDS)) {
    const { row, show } = drawField(settings, name, field);
    shows[name] = show;
    byId("setting-fields").append(row);
  }
  settings.addEventListener("change", ({ detail }) => shows[detail](settings.values[detail]));
  byId("reset-settings").addEventListener("click", () => settings.reset());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  return dialog;
}

function drawField(settings, name, field) {
  const id = `setting-${name}`;
  const error = h("span", { class: "field-error", id: `${id}-error`, role: "alert" });
  const hint = h("span", { class: "hint", id: `${id}-hint` }, field.hint ?? "");
  const inputs = drawInputs(id, field);
  const show = (value) => {
    for (const input of inputs) {
      if (field.toggle) input.checked = value;
      else if (document.activeElement !== input) input.value = value ?? "";
    }
    error.textContent = "";
  };
  for (const input of inputs) {
    input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    // a key is tried at the server: once, when it is complete
    input.addEventListener(field.secret ? "change" : "input", () => {
      try {
        settings.set(name, valueOf(input, field));
        for (const other of inputs) if (other !== input) other.value = input.value;
      } catch (problem) {
        error.textContent = problem.message;
      }
    });
    input.addEventListener("change", () => show(settings.values[name]));
    input.addEventListener("blur", () => show(settings.values[name]));
  }
  show(settings.values[name]);
  const label = h("label", { htmlFor: id }, field.label);
  const row = h("div", { class: `field ${field.toggle ? "toggle" : ""}` }, label,
    h("div", { class: "field-inputs" }, ...inputs), hint, error);
  return { row, show };
}

function drawInputs(id, field) {
  if (field.rows) return [h("textarea", { id, rows: field.rows })];
  if (field.toggle) return [h("input", { id, type: "checkbox", role: "switch" })];
  if (field.secret) return [h("input", { id, type: "password", autocomplete: "off" })];
  if (field.choices) {
    const options = Object.entries(field.choices).map(([value, text]) => h("option", { value }, text));
    return [h("select", { id }, ...options)];
  }
  const { min, max, step } = field;
  const number = h("input", { id, type: "number", min, max, step: step === 1 ? 1 : "any", inputMode: "decimal" });
  if (!field.slider) return [number];
  const slider = h("input", { type: "range", min, max, step, aria: { label: `${field.label}, slider` } });
  return [slider, number];
}

function valueOf(input, field) {
  if (field.toggle) return input.checked;
  if (field.step === undefined) return input.value;
  return input.value.trim() === "" ? (field.empty ?? NaN) : Number(input.value);
}
