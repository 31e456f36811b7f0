/**
 * What the reader does to conversations: ask, stop, regenerate, edit, delete. The one idea: every
 * change is made to the tree first (conversation.js), then stored, then announced by an event that
 * the views follow; a view never changes a conversation. Answers go on when another conversation is
 * opened. Left out: how anything looks.
 *
 * Events: "open" (another conversation), "change" (its messages), "grow" (detail: a message that
 * streams), "wait" (for a server that starts), "finish" (detail: a message that is complete), "list"
 * (titles), "notice" (detail).
 */

import { ApiError, continuesText, furthest, standIn, streamAnswer } from "./api.js";
import * as tree from "./conversation.js";
import { merge } from "./merge.js";

/** Between two saves of an answer that grows. */
const SAVE_MS = 700;

/** Between two questions whether a server has started, at least, and where it does not say. */
const LEAST_WAIT_S = 2;
const USUAL_WAIT_S = 5;

export class Session extends EventTarget {
  #streams = new Map();
  #waiting = new Set();
  #working = new Map();
  #saveTimers = new Map();
  /** What is on its way to the database, which a page that closes would lose: one `{ conversation }` each. */
  #storing = new Set();
  /** Conversations that are gone, and whether this tab has deleted them. */
  #deleted = new Map();

  constructor(database, settings) {
    super();
    // models: those that answer; available: all that the server has, as loadModels() found them
    Object.assign(this, { database, settings, models: [], available: [], loadModels: async () => {} });
    this.conversation = tree.newConversation();
    database.addEventListener("change", ({ detail }) => this.#changedElsewhere(detail));
    addEventListener("pagehide", () => this.#saveAtOnce());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) return;
      for (const conversation of this.#working.values()) this.#put(conversation); // another tab may write now
    });
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

  /**
   * Another tab has stored or deleted a conversation: go on from what it has, once its answers are
   * complete. What is under way here is joined with it when it is stored.
   */
  async #changedElsewhere(id) {
    if (id !== this.conversation.id && !this.#working.has(id) && !this.#deleted.has(id)) return;
    const stored = await this.database.get(id);
    if (!stored) {
      this.#deletedElsewhere(id);
      return;
    }
    if (this.#deleted.get(id)) {
      await this.database.remove(id); // that tab had not heard of it yet
      return;
    }
    this.#deleted.delete(id); // it has been brought back
    if (id !== this.conversation.id || this.#working.has(id)) return;
    if (Object.values(stored.messages).some(({ status }) => status === "streaming")) return;
    this.conversation = stored;
    this.#emit("change");
  }

  #deletedElsewhere(id) {
    if (this.#deleted.has(id)) return;
    this.#deleted.set(id, false);
    const conversation = this.#working.get(id);
    for (const message of Object.keys(conversation?.messages ?? {})) this.stopMessage(message);
    if (id === this.conversation.id && this.conversation.children.length) {
      this.newChat();
      this.#notice("Another tab has deleted this conversation.");
    }
  }

  async rename(id, title) {
    const conversation = await this.#load(id);
    if (!conversation || !title.trim()) return;
    Object.assign(conversation, { title: title.trim(), renamed: Date.now() });
    await this.#store(conversation);
    if (conversation.id === this.conversation.id) this.#emit("change");
  }

  async deleteConversation(id) {
    const conversation = await this.#load(id);
    if (!conversation) return;
    this.#deleted.set(id, true); // an answer that ends now must not store it again
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
    for (const conversation of conversations) await this.#put(conversation);
    this.#emit("list"); // once: the list is drawn anew each time, as long as it is by then
    await this.open(conversations[0].id);
  }

  // --- what is said ---------------------------------------------------------------------------

  /** Whether there is anyone to ask; the server is asked again, and the reader told. */
  async haveModels() {
    if (this.models.length === 0) await this.loadModels();
    if (this.models.length === 0) this.#notice("The server has no model to ask.");
    return this.models.length > 0;
  }

  /** The models that answer from now on. */
  chooseModels(ids) {
    this.models = ids;
    if (this.conversation.children.length) this.#emit("change"); // what a retry would ask
  }

  ask(text) {
    const last = tree.path(this.conversation).at(-1);
    this.#askAfter(last?.id ?? null, text);
  }

  /** Say something else in the place of one's message: a new branch. */
  edit(id, text) {
    const { messages } = this.conversation;
    const answers = messages[id].children.map((child) => messages[child]);
    this.#askAfter(messages[id].parent, text, { leftOut: tree.leftOut(answers) });
  }

  #askAfter(parent, text, options = {}) {
    const message = tree.add(this.conversation, parent, tree.newMessage("user", text));
    this.#answer(message.id, this.models, options);
  }

  /** Another answer to the same question, from the models that gave this one. */
  async regenerate(id) {
    const { conversation } = this;
    if (!(await this.haveModels()) || !conversation.messages[id]) return;
    const { parent } = conversation.messages[id];
    const group = tree.groupOf(conversation, conversation.messages[id]);
    this.#answer(parent, this.#stillThere(group), { conversation, leftOut: tree.leftOut(group) });
  }

  /** The models of some answers or their stand-ins; where the server has neither, those chosen now. */
  #stillThere(answers) {
    const known = answers.map(({ model }) => standIn(model, this.available)).filter(Boolean);
    return known.length ? [...new Set(known)] : this.models;
  }

  /** The models that a retry of a failed answer asks. */
  modelsToRetry(answer) {
    return this.#stillThere([answer]).slice(0, answer.group ? 1 : undefined);
  }

  /** After a failure: the same again, in the place of an answer that is empty and the last. */
  async retry(id, { leftOut = this.conversation.messages[id].leftOut } = {}) {
    const { conversation } = this;
    if (!(await this.haveModels()) || !conversation.messages[id]) return;
    const answer = conversation.messages[id];
    const { parent, parts, group } = answer;
    const shown = tree.shownAfter(conversation, parent);
    if (parts.length === 0 && answer.children.length === 0) tree.remove(conversation, id);
    // one of several that was not gone on from is not gone on from now
    const select = shown === id ? undefined : shown;
    this.#answer(parent, this.modelsToRetry(answer), { conversation, leftOut, group, select });
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
    const { conversation } = this;
    const besides = (message) => (message.group ? tree.groupOf(conversation, message) : [message]);
    return tree.path(conversation).flatMap(besides).some(({ id }) => this.#streams.has(id));
  }

  /** Whether an answer waits for a server that starts. */
  isWaiting(id) {
    return this.#waiting.has(id);
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

  /**
   * Answers of `models` to `parent`, of which `select` is shown, by default the one of the most
   * finished model. Models side by side are sent each its own answers, not the shown ones.
   */
  #answer(parent, models, options = {}) {
    const { conversation = this.conversation, leftOut = 0, group = groupFor(models), select } = options;
    const history = tree.pathTo(conversation, parent);
    const answers = models.map((model) => {
      const thread = group ? tree.threadOf(conversation, history, model) : history;
      const turns = Math.max(leftOut, tree.leftOut(thread));
      const more = { model, group, leftOut: turns || undefined, status: "streaming" };
      const answer = tree.add(conversation, parent, tree.newMessage("assistant", "", more));
      this.#stream(conversation, history, tree.withoutTurns(thread, turns), answer);
      return answer;
    });
    tree.select(conversation, select ?? answers[models.indexOf(furthest(models))].id);
    this.#changed(conversation);
  }

  /** Fill `answer` to `sent`, which is what its model remembers of `history`. */
  async #stream(conversation, history, sent, answer) {
    const { values } = this.settings;
    const controller = new AbortController();
    this.#streams.set(answer.id, controller);
    this.#working.set(conversation.id, conversation);
    const messages = tree.apiMessages(sent, values.system);
    const request = { model: answer.model, messages, settings: values, signal: controller.signal };
    try {
      await this.#read(conversation, answer, request);
      delete answer.status;
    } catch (error) {
      if (error.kind === "gone") await this.loadModels(); // the server was started again with others
      this.#fail(answer, error, { history, sent, settings: values });
    }
    this.#streams.delete(answer.id);
    this.#waiting.delete(answer.id);
    if (!Object.keys(conversation.messages).some((id) => this.#streams.has(id))) this.#working.delete(conversation.id);
    conversation.updated = Date.now();
    this.#changed(conversation);
    if (conversation === this.conversation) this.#emit("finish", answer);
  }

  /** Read the answer as it comes; a server that starts is asked again until it has started. */
  async #read(conversation, answer, request) {
    for (;;) {
      const start = performance.now();
      try {
        for await (const { part, text, tokens, finish, usage } of streamAnswer(request)) {
          if (finish) {
            answer.finish = finish === "length" ? lengthReached(request) : finish;
            if (usage && answer.stats) answer.stats.tokens = usage.completion_tokens;
          } else {
            this.#grow(conversation, answer, { part, text, tokens }, start);
          }
        }
        return;
      } catch (error) {
        if (error.kind !== "starting") throw error;
        this.#wait(conversation, answer);
        await pause(Math.max(LEAST_WAIT_S, error.retryAfter ?? USUAL_WAIT_S), request.signal);
      } finally {
        if (answer.stats) answer.stats.totalMs = performance.now() - start;
      }
    }
  }

  #wait(conversation, answer) {
    if (this.#waiting.has(answer.id)) return;
    const isFirst = this.#waiting.size === 0;
    this.#waiting.add(answer.id);
    if (conversation !== this.conversation) return;
    this.#emit("change");
    if (isFirst) this.#emit("wait");
  }

  #grow(conversation, answer, { part, text, tokens }, start) {
    if (this.#waiting.delete(answer.id) && conversation === this.conversation) this.#emit("change");
    answer.stats ??= { firstMs: performance.now() - start, tokens: 0 };
    answer.stats.tokens += Math.max(1, tokens.length);
    tree.appendText(answer, part, text);
    if (tokens.length) (answer.tokens ??= []).push(...tokens);
    this.#saveSoon(conversation);
    if (conversation === this.conversation) this.#emit("grow", answer);
  }

  #fail(answer, error, { history, sent, settings }) {
    if (error.name === "AbortError") {
      answer.status = "stopped";
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    const { kind = "server", message, retryAfter = null } = error;
    answer.status = "failed";
    answer.error = { kind, message, retryAfter };
    if (kind === "context") Object.assign(answer.error, remedy(answer.model, history, sent, settings));
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
    await this.#put(conversation);
    this.#emit("list");
  }

  /** Store a conversation joined with what other tabs have made of it. */
  async #put(conversation) {
    if (this.#deleted.has(conversation.id)) return;
    let changed = false;
    const isGrowing = (id) => this.#streams.has(id);
    const storing = { conversation };
    this.#storing.add(storing);
    await this.database.put(conversation, (ours, theirs) => (changed = merge(ours, theirs, isGrowing)));
    this.#storing.delete(storing);
    if (changed && conversation === this.conversation) this.#emit("change");
  }

  #saveSoon(conversation) {
    if (this.#saveTimers.has(conversation.id)) return;
    const save = () => {
      this.#saveTimers.delete(conversation.id);
      this.#put(conversation);
    };
    this.#saveTimers.set(conversation.id, setTimeout(save, SAVE_MS));
  }

  /** What grows, and what is being stored: the page closes. */
  #saveAtOnce() {
    const storing = [...this.#storing].map(({ conversation }) => conversation);
    for (const conversation of new Set([...this.#working.values(), ...storing])) {
      if (!this.#deleted.has(conversation.id)) this.database.put(conversation);
    }
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

/** Which length: without a limit of its own an answer may have what the context holds besides. */
function lengthReached({ model, settings }) {
  return settings.maxTokens === null && !continuesText(model) ? "context" : "length";
}

/** What helps where all that was sent was too long: turns to leave out, or else what is to blame. */
function remedy(model, history, sent, { system, maxTokens }) {
  const leaveOut = continuesText(model) ? 0 : tree.turnsToLeaveOut(history, sent);
  if (leaveOut) return { leaveOut };
  const addsSystem = system.trim() !== "" && !continuesText(model);
  return { kind: addsSystem || maxTokens !== null ? "settings" : "message" };
}

/** Wait, or throw AbortError as soon as `signal` is aborted. */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
