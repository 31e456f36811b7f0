/**
 * The token view: every token of an answer on a colour for its probability; pointing at one, or
 * moving to it with the arrow keys, shows what else could have stood there.
 */

import { byId, h } from "./dom.js";

/** Tints, from improbable to certain; tokens.css has their colours. */
const TINTS = 6;

/** Whether there is anything to show. */
export const tokensShown = (message) => Boolean(message.tokens?.length);

/** `tokens`: [text, logprob or null (written by the tool), [[text, logprob], ...]]. */
export function drawTokens(tokens) {
  const spans = tokens.map(([text, logprob], index) => {
    const label = logprob === null ? `${visible(text)}, by the tool` : `${visible(text)}, ${percent(logprob)}`;
    const ends = text.endsWith("\n") ? "line-end" : ""; // it gets a sign, to have something to point at
    return h("span", { class: `token ${tint(logprob)} ${ends}`, role: "img", dataset: { index }, tabIndex: index ? -1 : 0,
      aria: { label } }, text);
  });
  const box = h("div", { class: "tokens", role: "group", aria: { label: "Tokens; arrow keys move" } }, ...spans);
  const show = (span) => showCard(span, tokens[Number(span.dataset.index)]);
  box.addEventListener("pointerover", ({ target }) => target.matches(".token") && show(target));
  box.addEventListener("pointerleave", hideCard);
  box.addEventListener("focusin", ({ target }) => target.matches(".token") && show(target));
  box.addEventListener("focusout", hideCard);
  box.addEventListener("keydown", (event) => moveFocus(event, spans));
  return h("div", {}, drawLegend(), box);
}

/** One tab stop for the whole answer; arrows go from token to token. */
function moveFocus(event, spans) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = spans[spans.indexOf(event.target) + step];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function drawLegend() {
  const tints = Array.from({ length: TINTS }, (_, index) => h("span", { class: `token tint-${index}` }, " "));
  return h("p", { class: "legend" }, "unlikely ", ...tints, " certain");
}

function showCard(span, [text, logprob, alternatives]) {
  const card = byId("token-card");
  const rows = alternatives.map(([other, value]) => drawRow(other, value, other === text));
  const own = alternatives.some(([other]) => other === text) || logprob === null ? [] : [drawRow(text, logprob, true)];
  const body = logprob === null ? [h("p", {}, "Written by the tool, not the model.")] : [h("ol", {}, ...rows, ...own)];
  card.replaceChildren(...body);
  card.hidden = false;
  const at = span.getBoundingClientRect();
  const below = at.bottom + card.offsetHeight + 12 < innerHeight;
  card.style.top = `${below ? at.bottom + 6 : at.top - card.offsetHeight - 6}px`;
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 8))}px`;
}

/** Whether there was a card to hide. */
export function hideCard() {
  const card = byId("token-card");
  const shown = !card.hidden;
  card.hidden = true;
  return shown;
}

function drawRow(text, logprob, chosen) {
  const bar = h("meter", { min: 0, max: 1, value: Math.exp(logprob), aria: { label: "Probability" } });
  return h("li", { class: chosen ? "chosen" : "" }, h("code", {}, visible(text)), bar, h("span", {}, percent(logprob)));
}

function tint(logprob) {
  if (logprob === null) return "forced";
  return `tint-${Math.min(TINTS - 1, Math.floor(Math.exp(logprob) * TINTS))}`;
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return `${value < 10 ? value.toFixed(2) : value.toFixed(1)}%`;
}

/** Spaces and line ends as signs. */
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
