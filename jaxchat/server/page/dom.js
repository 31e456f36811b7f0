/** Elements without markup: text stays text, so nothing that a user or a model wrote can run. */

const SVG = "http://www.w3.org/2000/svg";

/** Strokes on a grid of 24, drawn for this page. */
const ICONS = {
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  done: "M5 13l4.5 4.5L19 7",
  down: "M12 5v14M6 13l6 6 6-6",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  menu: "M4 7h16M4 12h16M4 17h10",
  new: "M12 5v14M5 12h14",
  next: "M9 5l7 7-7 7",
  previous: "M15 5l-7 7 7 7",
  retry: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  stop: "M7 7h10v10H7z",
  tokens: "M4 6h5v5H4zM12 6h8v5h-8zM4 14h9v5H4zM16 14h4v5h-4z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  upload: "M12 16V5M7 9l5-5 5 5M5 20h14",
};

/** `h("button", { class: "x", onclick: f, aria: { label: "y" } }, "text", child)` */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "aria") setAria(element, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function setAria(element, values) {
  for (const [name, value] of Object.entries(values)) element.setAttribute(`aria-${name}`, value);
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows only an icon; its label is read aloud and shown on hover. */
export function iconButton(name, label, onclick, properties = {}) {
  return h(
    "button",
    { class: "icon-button", type: "button", title: label, aria: { label }, onclick, ...properties },
    icon(name),
  );
}

/** Give the elements of index.html that ask for one with `data-icon` their icon. */
export function drawIcons(root) {
  for (const element of root.querySelectorAll("[data-icon]")) {
    element.prepend(icon(element.dataset.icon));
    const label = element.getAttribute("aria-label");
    if (label && !element.title) element.title = label;
  }
}

export const byId = (id) => document.getElementById(id);

/**
 * Whether a key is an input method's, which Enter makes take a word. In Safari the composition has
 * ended before the key is told, and only its code says whose it was.
 */
export const isOfInputMethod = (event) => event.isComposing || event.keyCode === 229;

/** Put the focus where one writes; not on a phone, whose keyboard would cover the conversation. */
export function focusPrompt() {
  if (!matchMedia("(pointer: coarse)").matches) byId("prompt").focus({ preventScroll: true });
}

/** Read something aloud, once. */
export function announce(text) {
  byId("announcer").textContent = "";
  requestAnimationFrame(() => (byId("announcer").textContent = text));
}

/** Show for two seconds that a button did what it says, and say so. */
export function confirmCopied(button) {
  announce("Copied.");
  const mark = icon("done");
  button.firstElementChild.replaceWith(mark);
  button.classList.add("done");
  setTimeout(() => {
    mark.replaceWith(icon("copy"));
    button.classList.remove("done");
  }, 2000);
}
