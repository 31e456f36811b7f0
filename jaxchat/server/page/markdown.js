/**
 * Markdown on the page. The server turns it into sanitised HTML (jaxchat/server/markdown.py); this
 * is the only module that turns text into markup, through the one Trusted Types policy that the
 * page's Content-Security-Policy names. Where the server does not answer, text stays plain.
 */

import { h, icon } from "./dom.js";

const MAX_TEXTS = 32;
/** Of a request, below the server's limit (MAX_MARKDOWN_BYTES). */
const MAX_BYTES = 480_000;
/** Longest wait for the server; a text that it has not turned by then is shown as it is. */
const PATIENCE_MS = 5000;
const CACHED_TEXTS = 300;
/** Between two renderings of a growing answer, at least, and this many times as long as one took. */
const PAUSE_MS = 80;
const PAUSE_SHARE = 3;

const policy = globalThis.trustedTypes?.createPolicy("jaxchat-markdown", {
  createHTML: (html) => html,
}) ?? { createHTML: (html) => html };

const cache = new Map();
let queue = [];

/** The sanitised HTML of `text`, or null where the server gives none. */
async function toHtml(text) {
  if (!text.trim()) return "";
  if (bytesOf(text) > MAX_BYTES) return null;
  if (cache.has(text)) return cache.get(text);
  const { promise, resolve } = Promise.withResolvers();
  queue.push({ text, resolve });
  if (queue.length === 1) queueMicrotask(flush);
  return promise;
}

/** Ask for everything that was wanted in this turn of the event loop, a few texts per request. */
function flush() {
  const wanted = queue;
  queue = [];
  while (wanted.length) {
    let [count, bytes] = [1, bytesOf(wanted[0].text)];
    while (count < Math.min(wanted.length, MAX_TEXTS)) {
      bytes += bytesOf(wanted[count].text);
      if (bytes > MAX_BYTES) break;
      count += 1;
    }
    fetchHtml(wanted.splice(0, count));
  }
}

async function fetchHtml(jobs) {
  let html = [];
  try {
    const response = await fetch("page/markdown", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ texts: jobs.map((job) => job.text) }),
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (response.ok) ({ html } = await response.json());
  } catch {
    // the server is away, or too slow: plain text
  }
  jobs.forEach(({ text, resolve }, index) => {
    if (html[index] !== undefined) remember(text, html[index]);
    resolve(html[index] ?? null);
  });
}

/** What a text takes in a request. */
const bytesOf = (text) => new TextEncoder().encode(JSON.stringify(text)).length;

function remember(text, html) {
  cache.set(text, html);
  if (cache.size > CACHED_TEXTS) cache.delete(cache.keys().next().value);
}

/** An element that shows Markdown and keeps up with a text that grows. */
export class Prose {
  #wanted = null;
  #busy = false;
  #tail = null;

  constructor() {
    this.element = h("div", { class: "prose" });
  }

  /** Show `text`. Resolves when it, or a later text, is shown. */
  async show(text) {
    if (text === this.#wanted) return;
    this.#wanted = text;
    if (this.#busy) return;
    this.#busy = true;
    for (let shown = null; shown !== this.#wanted; ) {
      shown = this.#wanted;
      if (shown && !this.element.hasChildNodes()) showPlain(this.element, shown);
      const start = performance.now();
      const html = await toHtml(shown);
      if (this.#tail) delete this.#tail.dataset.tail;
      if (html === null) showPlain(this.element, (shown = this.#wanted)); // with what came meanwhile
      else patch(this.element, html);
      this.#tail = tailOf(this.element);
      this.#tail.dataset.tail = "";
      const took = performance.now() - start;
      if (html === null) await sleep(PAUSE_MS); // however long the server was waited for
      else if (shown !== this.#wanted) await sleep(Math.max(PAUSE_MS, PAUSE_SHARE * took));
    }
    this.#busy = false;
  }
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function showPlain(element, text) {
  element.classList.add("plain");
  element.textContent = text;
}

/** Replace only the blocks that changed: what the reader has selected above stays selected. */
function patch(element, html) {
  if (element.classList.contains("plain")) element.replaceChildren();
  element.classList.remove("plain");
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  for (const block of template.content.querySelectorAll("pre")) addHead(block);
  for (const table of template.content.querySelectorAll("table")) makeScrollable(table);
  const blocks = [...template.content.children];
  blocks.forEach((block, index) => {
    const shown = element.children[index];
    if (!shown) element.append(block);
    else if (!shown.isEqualNode(block)) shown.replaceWith(block);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

/** The element that ends where the text ends: the cursor of an answer that grows stands there. */
function tailOf(element) {
  if (element.matches("code")) return element; // a line end in code counts
  const nodes = [...element.childNodes].filter((node) => node.nodeType !== Node.TEXT_NODE || node.data.trim());
  return nodes.at(-1) instanceof HTMLElement && !nodes.at(-1).matches("br, hr") ? tailOf(nodes.at(-1)) : element;
}

/** The line above code: its language and a button to copy it (thread.js hears the click). */
function addHead(pre) {
  const language = pre.dataset.language ?? "";
  const label = language ? `Copy the ${language} code` : "Copy the code";
  const head = h("div", { class: "code-head" }, h("span", {}, language || "text"),
    h("button", { class: "icon-button", type: "button", title: label, aria: { label }, dataset: { action: "copy-code" } },
      icon("copy")));
  const figure = h("div", { class: "code" }, head);
  pre.replaceWith(figure);
  pre.tabIndex = 0; // long lines scroll, and the keyboard must reach what scrolls
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `${language} code` : "Code");
  figure.append(pre);
}

function makeScrollable(table) {
  const box = h("div", { class: "table", tabIndex: 0, role: "region", aria: { label: "Table" } });
  table.replaceWith(box);
  box.append(table);
}
