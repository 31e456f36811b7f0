/**
 * Conversations to files and back. JSON keeps everything; Markdown has what is shown, and reads
 * back as one branch. A file is not to be trusted: what comes in is rebuilt field by field, with
 * new ids, and everything else in it is dropped.
 */

import { add, newConversation, newId, newMessage, path } from "./conversation.js";
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

/** The shown branch. A line of a message that looks like our headings gets a backslash. */
export function toMarkdown(conversation) {
  const sections = path(conversation).map((message) => {
    const text = message.parts.map(({ type, text: part }) => (type === "text" ? part : fence(type, part))).join("");
    return `${HEADINGS[message.role]}\n\n${text.replace(/^(\\*)(##? )/gm, "\\$1$2")}`;
  });
  return [`# ${conversation.title.replace(/\s+/g, " ")}`, ...sections].join("\n\n") + "\n";
}

const fence = (type, text) => `\n\`\`\`${type}\n${text}\n\`\`\`\n`;

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
  const [head, ...sections] = text.replaceAll("\r\n", "\n").split(/^(?=## (?:You|Answer)$)/m);
  if (sections.length === 0) throw new Error("it has no line “## You” or “## Answer”");
  let parent = null;
  for (const section of sections) {
    const [heading] = section.split("\n", 1);
    const role = heading === HEADINGS.user ? "user" : "assistant";
    const body = section.slice(heading.length).trim().replace(/^\\(\\*##? )/gm, "$1");
    const message = newMessage(role, "", role === "user" ? {} : { model: "" });
    message.parts = role === "user" ? [{ type: "text", text: body }] : partsOf(body);
    parent = add(conversation, parent, message).id;
  }
  conversation.title = head.match(/^# (.+)$/m)?.[1].trim() || conversation.title || "Imported";
  return conversation;
}

function partsOf(body) {
  const parts = [];
  const pieces = body.split(/\n?^```(python_output|python)\n([^]*?)\n```$\n?/m);
  for (let at = 0; at < pieces.length; at += 3) {
    if (pieces[at]) parts.push({ type: "text", text: pieces[at] });
    if (at + 2 < pieces.length) parts.push({ type: pieces[at + 1], text: pieces[at + 2] });
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
