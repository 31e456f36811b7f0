/**
 * A conversation is a tree of messages. The one idea: editing and regenerating never overwrite,
 * they add a sibling, and every message remembers which of its children is shown. What the reader
 * sees is the path from the root along these choices. Plain data and pure functions on it, so that
 * the tree can be stored, exported and tested as it is.
 *
 *   { id, title, created, updated, children: [id], active: index, messages: { id: message },
 *     revision?, renamed?: time, removed?: { id: time } }
 *   message: { id, parent, role, parts: [{ type, text }], children, active, created,
 *              model?, group?, leftOut?, status?, finish?, error?, stats?, tokens?, restored?: time }
 *
 * `group` ties answers of several models to one question; they are one alternative, shown side by
 * side. `leftOut` of an answer counts the turns, from the first on, that its model was not sent
 * because all did not fit. `status` is "streaming", "stopped" or "failed", and absent when the
 * message is complete.
 */

const TITLE_CHARS = 60;

export const newId = () => crypto.randomUUID?.() ?? fallbackId();

/** randomUUID exists only on localhost and https; a LAN address has neither. */
function fallbackId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("-");
}

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, children: [], active: 0, messages: {} };
}

export function newMessage(role, text, more = {}) {
  const parts = text === "" ? [] : [{ type: "text", text }];
  return { id: newId(), parent: null, role, parts, children: [], active: 0, created: Date.now(), ...more };
}

/** What holds the children of `id`: the message, or for null the conversation itself. */
const holder = (conversation, id) => (id === null ? conversation : conversation.messages[id]);

/** Add `message` as the newest child of `parent` and show it. */
export function add(conversation, parent, message) {
  message.parent = parent;
  conversation.messages[message.id] = message;
  const siblings = holder(conversation, parent);
  siblings.active = siblings.children.push(message.id) - 1;
  if (!conversation.title && message.role === "user") conversation.title = titleOf(message);
  conversation.updated = Date.now();
  return message;
}

function titleOf(message) {
  const line = textOf(message).trim().replace(/\s+/g, " ");
  return line.length > TITLE_CHARS ? `${line.slice(0, TITLE_CHARS - 1).trimEnd()}…` : line;
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const shown = [];
  for (let at = conversation; at.children.length; ) {
    at = conversation.messages[at.children[at.active]];
    shown.push(at);
  }
  return shown;
}

/** The messages from the first up to and including `id`. */
export function pathTo(conversation, id) {
  const messages = [];
  for (let at = id; at !== null; at = conversation.messages[at].parent) {
    messages.unshift(conversation.messages[at]);
  }
  return messages;
}

/** The alternatives to a message, in the order they were made: each a list (a group has several). */
export function versions(conversation, id) {
  const byGroup = new Map();
  for (const sibling of holder(conversation, conversation.messages[id].parent).children) {
    const message = conversation.messages[sibling];
    const key = message.group ?? message.id;
    byGroup.set(key, [...(byGroup.get(key) ?? []), message]);
  }
  return [...byGroup.values()];
}

/** Which of `versions` holds the message. */
export function versionIndex(conversation, id) {
  return versions(conversation, id).findIndex((group) => group.some((message) => message.id === id));
}

/** The answers of a message's group, or the message alone. */
export function groupOf(conversation, { id }) {
  return versions(conversation, id)[versionIndex(conversation, id)];
}

/** The id of the shown child of `id`. */
export function shownAfter(conversation, id) {
  const { children, active } = holder(conversation, id);
  return children[active];
}

/** Show this message, and what follows it. */
export function select(conversation, id) {
  const siblings = holder(conversation, conversation.messages[id].parent);
  siblings.active = siblings.children.indexOf(id);
}

/**
 * Remove a message and everything that follows it; the alternative before it is shown. Returns what
 * `restore` needs.
 */
export function remove(conversation, id) {
  const { parent } = conversation.messages[id];
  const siblings = holder(conversation, parent);
  const { active } = siblings;
  const index = siblings.children.indexOf(id);
  siblings.children.splice(index, 1);
  if (active >= index) siblings.active = Math.max(0, active - 1);
  const messages = subtree(conversation, id).map((gone) => conversation.messages[gone]);
  for (const message of messages) delete conversation.messages[message.id];
  conversation.updated = Date.now();
  // another tab that still has them must hear of it
  for (const message of messages) (conversation.removed ??= {})[message.id] = conversation.updated;
  return { messages, parent, index, active };
}

/** Put back what `remove` took; false where what it hung on is gone too. */
export function restore(conversation, { messages, parent, index, active }) {
  if (!holder(conversation, parent) || conversation.messages[messages[0].id]) return false;
  for (const message of messages) {
    conversation.messages[message.id] = message;
    message.restored = Date.now() + 1; // after its removal, be that in the same millisecond
  }
  const siblings = holder(conversation, parent);
  siblings.children.splice(index, 0, messages[0].id);
  siblings.active = Math.min(active, siblings.children.length - 1);
  conversation.updated = Date.now();
  return true;
}

function subtree(conversation, id) {
  const ids = [id];
  for (let next = 0; next < ids.length; next += 1) ids.push(...conversation.messages[ids[next]].children);
  return ids;
}

/** Append streamed text; neighbours of one kind are one part. */
export function appendText(message, type, text) {
  if (!text) return;
  const last = message.parts.at(-1);
  if (last?.type === type) last.text += text;
  else message.parts.push({ type, text });
}

/** What a reader sees as prose: without calls of the tool. */
export function textOf(message) {
  return message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

// --- what a model is sent ------------------------------------------------------------------------

/** The messages as `model` remembers them: of answers side by side its own, where it gave one. */
export function threadOf(conversation, messages, model) {
  return messages.map((message) => {
    if (!message.group) return message;
    const latestFirst = groupOf(conversation, message).toReversed();
    return [message, ...latestFirst].find((answer) => answer.model === model && !isSilent(answer)) ?? message;
  });
}

const isQuestion = ({ role }) => role === "user";

/** How many turns at the beginning the answers among `messages` were given without. */
export function leftOut(messages) {
  return messages.reduce((most, message) => Math.max(most, message.leftOut ?? 0), 0);
}

/** The messages without the first `turns` turns; the last question always stays. */
export function withoutTurns(messages, turns) {
  const questions = messages.filter(isQuestion);
  if (!turns || questions.length === 0) return messages;
  return messages.slice(messages.indexOf(questions[Math.min(turns, questions.length - 1)]));
}

/** After `sent` was too long: turns of `all` to leave out, half of those sent; 0 where none can be. */
export function turnsToLeaveOut(all, sent) {
  const questions = spoken(sent).filter(isQuestion);
  if (questions.length < 2) return 0;
  return all.filter(isQuestion).indexOf(questions[Math.ceil((questions.length - 1) / 2)]);
}

/** The API's messages for the answer after `messages`. */
export function apiMessages(messages, systemPrompt) {
  const sent = spoken(messages).map((message) => ({ role: message.role, content: contentOf(message) }));
  return systemPrompt.trim() ? [{ role: "system", content: systemPrompt }, ...sent] : sent;
}

/** The messages that take turns, from a question on: unanswered questions are left out. */
function spoken(messages) {
  const turns = [];
  for (const message of messages) {
    if (isSilent(message)) continue;
    // two of one role in a row happen where an answer stayed empty: the later one counts
    if (turns.at(-1)?.role === message.role) turns.pop();
    turns.push(message);
  }
  if (turns[0]?.role === "assistant") turns.shift();
  return turns;
}

/** Whether a message has nothing that a model could be sent. */
function isSilent(message) {
  const content = contentOf(message);
  return typeof content === "string" && content.trim() === "";
}

/**
 * Text, or where the tool was used the list of parts, as jaxchat/conversation.py has it. A small
 * model also writes what is no conversation, such as output without a call: then its text alone.
 */
function contentOf(message) {
  const parts = message.parts.filter((part) => part.text !== "" || part.type === "python_output");
  const wellFormed = parts.every(({ type }, at) => type !== "python_output" || parts[at - 1]?.type === "python");
  const hasTool = parts.some(({ type }) => type !== "text");
  return hasTool && wellFormed ? parts : textOf(message);
}
