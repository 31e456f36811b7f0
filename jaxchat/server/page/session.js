/**
 * What the reader does to conversations: ask, stop, regenerate, edit, delete. The one idea: every
 * change is made to the tree first (conversation.js), then stored, then announced by an event that
 * the views follow; a view never changes a conversation. Answers go on when another conversation is
 * opened. Left out: how anything looks.
 *
 * Events: "open" (another conversation), "change" (its messages), "grow" (detail: a message that
 * streams), "finish" (detail: a message that is complete), "list" (titles), "notice" (detail).
 */

import { ApiError, streamAnswer } from "./api.js";
import * as tree from "./conversation.js";

/** Between two saves of an answer that grows. */
const SAVE_MS = 700;

export class Session extends EventTarget {
  #streams = new Map();
  #working = new Map();
  #saveTimers = new Map();
  #deleted = new Set();

  constructor(database, settings) {
    super();
    // models: those that answer; available: all that the server has, as loadModels() found them
    Object.assign(this, { database, settings, models: [], available: [], loadModels: async () => {} });
    this.conversation = tree.newConversation();
    database.addEventListener("change", ({ detail }) => this.#changedElsewhere(detail));
    addEventListener("pagehide", () => this.saveAll());
    document.addEventListener("visibilitychange", () => document.hidden && this.saveAll());
  }

  // --- which conversation ---------------------------------------------------------------------

  newChat() {
    this.conversation = tree.newConversation();
    this.#emit("open");
  }

  /** Open a stored conversation; false when there is none of this id. */
  async open(id) {
    const conversation = this.#working.get(id) ?? (await this.database.get(id));
    if (!conversation) return false;
    for (const message of Object.values(conversation.messages)) {
      // a stream that this page knows nothing of ended with the page that it belonged to
      if (message.status === "streaming" && !this.#streams.has(message.id)) message.status = "stopped";
    }
    this.conversation = conversation;
    this.#emit("open");
    return true;
  }

  /** Another tab has stored the open conversation: go on from what it has, once it is complete. */
  async #changedElsewhere(id) {
    if (id !== this.conversation.id || this.#working.has(id)) return;
    const stored = await this.database.get(id);
    if (!stored || id !== this.conversation.id || this.#working.has(id)) return;
    if (Object.values(stored.messages).some(({ status }) => status === "streaming")) return;
    this.conversation = stored;
    this.#emit("change");
  }

  async rename(id, title) {
    const conversation = await this.#load(id);
    if (!conversation || !title.trim()) return;
    conversation.title = title.trim();
    await this.#store(conversation);
    if (conversation.id === this.conversation.id) this.#emit("change");
  }

  async deleteConversation(id) {
    const conversation = await this.#load(id);
    if (!conversation) return;
    this.#deleted.add(id); // an answer that ends now must not store it again
    for (const message of Object.values(conversation.messages)) this.stopMessage(message.id);
    await this.database.remove(id);
    if (this.conversation.id === id) this.newChat();
    this.#emit("list");
    this.#notice(`Deleted “${conversation.title}”.`, () => {
      this.#deleted.delete(id);
      this.#store(conversation);
    });
  }

  /** Store conversations from elsewhere and open the first. */
  async adopt(conversations) {
    for (const conversation of conversations) await this.#store(conversation);
    await this.open(conversations[0].id);
  }

  // --- what is said ---------------------------------------------------------------------------

  /** Whether there is anyone to ask; the server is asked again, and the reader told. */
  async haveModels() {
    if (this.models.length === 0) await this.loadModels();
    if (this.models.length === 0) this.#notice("The server has no model to ask.");
    return this.models.length > 0;
  }

  ask(text) {
    const last = tree.path(this.conversation).at(-1);
    this.#askAfter(last?.id ?? null, text);
  }

  /** Say something else in the place of one's message: a new branch. */
  edit(id, text) {
    this.#askAfter(this.conversation.messages[id].parent, text);
  }

  #askAfter(parent, text) {
    const message = tree.add(this.conversation, parent, tree.newMessage("user", text));
    this.#answer(message.id, this.models);
  }

  /** Another answer to the same question, from the models that gave this one. */
  async regenerate(id) {
    const { conversation } = this;
    if (!(await this.haveModels()) || !conversation.messages[id]) return;
    const group = tree.versions(conversation, id)[tree.versionIndex(conversation, id)];
    this.#answer(conversation.messages[id].parent, this.#stillThere(group), { conversation });
  }

  /** The models of some answers, or where the server has none of them any more, those chosen now. */
  #stillThere(answers) {
    const known = answers.map(({ model }) => model).filter((model) => this.available.includes(model));
    return known.length ? known : this.models;
  }

  /** After a failure: the same again, in the place of an answer that is empty. */
  async retry(id, { dropTurns = 0 } = {}) {
    const { conversation } = this;
    if (!(await this.haveModels()) || !conversation.messages[id]) return;
    const { parent, parts, model, group } = conversation.messages[id];
    if (parts.length === 0) tree.remove(conversation, id);
    const models = this.#stillThere([{ model }]).slice(0, group ? 1 : undefined);
    this.#answer(parent, models, { conversation, dropTurns, group });
  }

  deleteMessage(id) {
    const { conversation } = this;
    const removed = tree.remove(conversation, id);
    for (const message of removed.messages) this.stopMessage(message.id);
    this.#changed(conversation);
    this.#notice("Deleted the message and what followed it.", async () => {
      const now = await this.#load(conversation.id); // it may have been opened anew since
      if (now && tree.restore(now, removed)) this.#changed(now);
    });
  }

  select(id) {
    tree.select(this.conversation, id);
    this.#changed(this.conversation);
  }

  // --- answers --------------------------------------------------------------------------------

  /** Whether the open conversation has an answer under way. */
  get streaming() {
    return tree.path(this.conversation).some((message) => this.#groupOf(message).some(({ id }) => this.#streams.has(id)));
  }

  isStreaming(conversationId) {
    return this.#working.has(conversationId);
  }

  /** Stop every answer of the open conversation. */
  stop() {
    for (const id of Object.keys(this.conversation.messages)) this.stopMessage(id);
  }

  stopMessage(id) {
    this.#streams.get(id)?.abort();
  }

  #groupOf(message) {
    return message.group
      ? tree.versions(this.conversation, message.id)[tree.versionIndex(this.conversation, message.id)]
      : [message];
  }

  #answer(parent, models, { conversation = this.conversation, dropTurns = 0, group = groupFor(models) } = {}) {
    const answers = models.map((model) =>
      tree.add(conversation, parent, tree.newMessage("assistant", "", { model, group, status: "streaming" })),
    );
    tree.select(conversation, answers[0].id);
    const history = tree.pathTo(conversation, parent);
    const kept = dropTurns ? history.slice(2 * dropTurns) : history;
    for (const answer of answers) this.#stream(conversation, kept, answer);
    this.#changed(conversation);
  }

  async #stream(conversation, history, answer) {
    const { values } = this.settings;
    const controller = new AbortController();
    this.#streams.set(answer.id, controller);
    this.#working.set(conversation.id, conversation);
    const messages = tree.apiMessages(history, values.system);
    const start = performance.now();
    try {
      const stream = streamAnswer({ model: answer.model, messages, settings: values, signal: controller.signal });
      for await (const { part, text, tokens, finish, usage } of stream) {
        if (finish) {
          answer.finish = finish;
          if (usage && answer.stats) answer.stats.tokens = usage.completion_tokens;
        } else {
          this.#grow(conversation, answer, { part, text, tokens }, start);
        }
      }
      delete answer.status;
    } catch (error) {
      this.#fail(answer, error, history);
    }
    if (answer.stats) answer.stats.totalMs = performance.now() - start;
    this.#streams.delete(answer.id);
    if (!Object.keys(conversation.messages).some((id) => this.#streams.has(id))) this.#working.delete(conversation.id);
    conversation.updated = Date.now();
    this.#changed(conversation);
    if (conversation === this.conversation) this.#emit("finish", answer);
  }

  #grow(conversation, answer, { part, text, tokens }, start) {
    answer.stats ??= { firstMs: performance.now() - start, tokens: 0 };
    answer.stats.tokens += Math.max(1, tokens.length);
    tree.appendText(answer, part, text);
    if (tokens.length) (answer.tokens ??= []).push(...tokens);
    this.#saveSoon(conversation);
    if (conversation === this.conversation) this.#emit("grow", answer);
  }

  #fail(answer, error, history) {
    if (error.name === "AbortError") {
      answer.status = "stopped";
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    const { kind = "server", message, retryAfter = null } = error;
    answer.status = "failed";
    answer.error = { kind, message, retryAfter };
    // the turns that can be left out: every question before this one, with its answer
    answer.error.turns = Math.floor((history.length - 1) / 2);
  }

  // --- storing --------------------------------------------------------------------------------

  async #load(id) {
    if (id === this.conversation.id) return this.conversation;
    return this.#working.get(id) ?? this.database.get(id);
  }

  async #changed(conversation) {
    if (conversation === this.conversation) this.#emit("change");
    await this.#store(conversation);
  }

  async #store(conversation) {
    clearTimeout(this.#saveTimers.get(conversation.id));
    this.#saveTimers.delete(conversation.id);
    if (this.#deleted.has(conversation.id)) return;
    await this.database.put(conversation);
    this.#emit("list");
  }

  #saveSoon(conversation) {
    if (this.#saveTimers.has(conversation.id)) return;
    const save = () => {
      this.#saveTimers.delete(conversation.id);
      if (!this.#deleted.has(conversation.id)) this.database.put(conversation);
    };
    this.#saveTimers.set(conversation.id, setTimeout(save, SAVE_MS));
  }

  saveAll() {
    for (const conversation of this.#working.values()) this.database.put(conversation);
  }

  #notice(text, undo = null) {
    this.#emit("notice", { text, undo });
  }

  #emit(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Answers of several models are one alternative. */
const groupFor = (models) => (models.length > 1 ? tree.newId() : undefined);
