/**
 * Conversations to files and back. JSON keeps everything; Markdown has what is shown, and reads
 * back as one branch. A file is not to be trusted: what comes in is rebuilt field by field, with
 * new ids, and everything else in it is dropped.
 */

import { add, appendText, newConversation, newId, newMessage, path, textOf } from "./conversation.js";
import { h } from "./dom.js";

const FORMAT = "jaxchat-conversations";
const MAX_FILE_BYTES = 64 * 1024 * 1024;
const MAX_MESSAGES = 20_000;
const ROLES = ["user", "assistant"];
const PARTS = ["text", "python", "python_output"];
const HEADINGS = { user: "## You", assistant: "## Answer" };

export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Lines that mean something in our files: in a message, such a line gets one backslash more. */
const OURS = /^(\\*)(##? |`{3,}(?:jaxchat-|python_output))/gm;
const mask = (text) => text.replace(OURS, "\\$1$2");
const unmask = (text) => text.replace(OURS, (_, backslashes, mark) => backslashes.slice(1) + mark);

/** A call of the tool or its output, in a fence that no code in an answer has. */
const FENCE = /\n?^(`{3,})jaxchat-(python_output|python)\n([^]*?)\n\1$\n?/m;

/** How calls were written before: as code in Python, with an output directly behind it. */
const OLD_CALL = /\n?^```python\n((?:(?!```).*\n)+)```\n\n?```python_output\n((?:(?!```).*\n)+)```$\n?/gm;

/** The shown branch. */
export function toMarkdown(conversation) {
  const sections = path(conversation).map((message) => {
    const text = message.role === "user" ? mask(textOf(message)) : joined(message.parts).map(written).join("");
    return `${HEADINGS[message.role]}\n\n${text}`;
  });
  return [`# ${conversation.title.replace(/\s+/g, " ")}`, ...sections].join("\n\n") + "\n";
}

/** The parts, neighbours of text as one, so that each begins a line. */
function joined(parts) {
  const message = { parts: [] };
  for (const { type, text } of parts) {
    if (type === "text") appendText(message, type, text);
    else message.parts.push({ type, text });
  }
  return message.parts;
}

const written = ({ type, text }) => (type === "text" ? mask(text) : fence(type, mask(text)));

/** The fence is longer than any in its text. */
function fence(type, text) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), ([ticks]) => ticks.length));
  const ticks = "`".repeat(longest + 1);
  return `\n${ticks}jaxchat-${type}\n${text}\n${ticks}\n`;
}

/** The conversations in a file; throws Error, saying what is wrong with it. */
export async function readFile(file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(`${file.name} is larger than ${MAX_FILE_BYTES >> 20} MB`);
  const text = await file.text();
  try {
    return /\.(md|markdown)$/i.test(file.name) ? [fromMarkdown(text)] : fromJson(text);
  } catch (error) {
    throw new Error(`${file.name} cannot be read: ${error.message}`, { cause: error });
  }
}

export function fromMarkdown(text) {
  const conversation = newConversation();
  const isOfWindows = !/(^|[^\r])\n/.test(text); // a carriage return may also be part of a message
  const lines = isOfWindows ? text.replaceAll("\r\n", "\n") : text;
  const [head, ...sections] = lines.replace(/\n$/, "\n\n").split(/^(?=## (?:You|Answer)$)/m);
  if (sections.length === 0) throw new Error("it has no line “## You” or “## Answer”");
  let parent = null;
  for (const section of sections) {
    const [heading] = section.split("\n", 1);
    const role = heading === HEADINGS.user ? "user" : "assistant";
    const body = section.slice(heading.length).replace(/^\n\n?/, "").replace(/\n?\n$/, "");
    const message = role === "user" ? newMessage(role, unmask(body)) : newMessage(role, "", { model: "" });
    if (role === "assistant") message.parts = partsOf(body);
    parent = add(conversation, parent, message).id;
  }
  conversation.title = head.match(/^# (.+)$/m)?.[1].trim() || conversation.title || "Imported";
  return conversation;
}

function partsOf(body) {
  const calls = (_, call, output) => fence("python", call.slice(0, -1)) + fence("python_output", output.slice(0, -1));
  const parts = [];
  const pieces = body.replace(OLD_CALL, calls).split(FENCE);
  for (let at = 0; at < pieces.length; at += 4) {
    if (pieces[at]) parts.push({ type: "text", text: unmask(pieces[at]) });
    if (at + 3 < pieces.length) parts.push({ type: pieces[at + 2], text: unmask(pieces[at + 3]) });
  }
  return parts;
}

export function fromJson(text) {
  const document = JSON.parse(text);
  if (document?.format !== FORMAT || !Array.isArray(document.conversations)) {
    throw new Error(`it is not a file of the format ${FORMAT}`);
  }
  if (document.conversations.length === 0) throw new Error("it holds no conversation");
  return document.conversations.map(rebuild);
}

/** A conversation made of what is valid in another. */
function rebuild(source) {
  const conversation = newConversation();
  if (!isObject(source) || !isObject(source.messages)) throw new Error("a conversation has no messages");
  const count = Object.keys(source.messages).length;
  if (count > MAX_MESSAGES) throw new Error(`a conversation has ${count} messages, at most ${MAX_MESSAGES}`);
  const groups = new Map();
  const seen = new Set();
  const queue = [[source, null]];
  while (queue.length) {
    const [from, parent] = queue.shift();
    const holder = parent === null ? conversation : conversation.messages[parent];
    for (const id of list(from.children)) {
      if (seen.has(id) || !Object.hasOwn(source.messages, id)) throw new Error("its messages are not a tree");
      seen.add(id);
      const message = add(conversation, parent, rebuildMessage(source.messages[id], groups));
      queue.push([source.messages[id], message.id]);
    }
    const last = holder.children.length - 1;
    holder.active = Number.isInteger(from.active) ? Math.max(0, Math.min(from.active, last)) : Math.max(0, last);
  }
  conversation.title = string(source.title) || conversation.title || "Imported";
  conversation.created = number(source.created) ?? conversation.created;
  conversation.updated = number(source.updated) ?? conversation.updated;
  return conversation;
}

function rebuildMessage(source, groups) {
  if (!isObject(source) || !ROLES.includes(source.role)) throw new Error("a message has no known role");
  const message = newMessage(source.role, "");
  message.parts = list(source.parts)
    .filter((part) => isObject(part) && PARTS.includes(part.type) && typeof part.text === "string")
    .map(({ type, text }) => ({ type, text }));
  message.created = number(source.created) ?? message.created;
  if (source.role === "user") return message;
  message.model = string(source.model);
  if (source.finish) message.finish = string(source.finish);
  if (source.status) message.status = "stopped";
  if (Number.isInteger(source.leftOut) && source.leftOut > 0) message.leftOut = source.leftOut;
  if (source.group) message.group = newGroup(groups, string(source.group));
  const { tokens, totalMs, firstMs } = isObject(source.stats) ? source.stats : {};
  if ([tokens, totalMs, firstMs].every(Number.isFinite)) message.stats = { tokens, totalMs, firstMs };
  const recorded = list(source.tokens).filter(isToken);
  if (recorded.length) message.tokens = recorded.map(([text, p, top]) => [text, p, top.map(([t, q]) => [t, q])]);
  return message;
}

function newGroup(groups, old) {
  if (!groups.has(old)) groups.set(old, newId());
  return groups.get(old);
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const list = (value) => (Array.isArray(value) ? value : []);
const string = (value) => (typeof value === "string" ? value.slice(0, 500) : "");
const number = (value) => (Number.isFinite(value) ? value : null);
const isPair = (pair) => Array.isArray(pair) && typeof pair[0] === "string" && Number.isFinite(pair[1]);
const isToken = (token) =>
  Array.isArray(token) && typeof token[0] === "string" && (token[1] === null || Number.isFinite(token[1])) &&
  Array.isArray(token[2]) && token[2].every(isPair);

/** Hand a text to the reader as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A title as a file name. */
export const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "conversation";
