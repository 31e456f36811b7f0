/**
 * Conversations in the browser's IndexedDB, one record each. Where the browser refuses (private
 * window, no space left) they stay in memory, and `onFailure` hears why, so that nothing is lost
 * silently. Left out: the small things (settings, drafts), which are in localStorage.
 */

import { newId, textOf } from "./conversation.js";

const STORE = "conversations";

export class Database extends EventTarget {
  #memory = new Map();
  #index = new Map();
  #askedToKeep = false;
  #opened;
  #channel = new BroadcastChannel("jaxchat.conversations");

  /**
   * `onFailure(error)` is called whenever a conversation could not be stored. The event "change"
   * tells that another tab has stored or removed one.
   */
  constructor(onFailure) {
    super();
    this.onFailure = onFailure;
    this.#opened = open().catch((error) => {
      onFailure(error);
      return null;
    });
    this.ready = this.#fillIndex();
    this.#channel.onmessage = ({ data }) => this.#changedElsewhere(data);
  }

  /**
   * Store a conversation. What another tab has stored meanwhile is first given to
   * `join(conversation, stored)`, in the same transaction, so that nobody writes in between; without
   * `join` it is overwritten, by the one request that a page which closes still makes.
   */
  async put(conversation, join = null) {
    const database = await this.#opened;
    try {
      if (!database) throw new Error("the browser offers no storage");
      await done(database.transaction(STORE, "readwrite"), (store) => {
        const write = () => store.put(Object.assign(conversation, { revision: newId() }));
        if (!join) {
          const written = write();
          store.transaction.commit(); // a page that closes does not live to see the request succeed
          return written;
        }
        const found = store.get(conversation.id);
        found.onsuccess = () => {
          const stored = found.result;
          if (stored && stored.revision !== conversation.revision) join(conversation, stored);
          write();
        };
        return found;
      });
      this.#index.set(conversation.id, summary(conversation));
      this.#memory.delete(conversation.id);
      this.#channel.postMessage(conversation.id);
      this.#askToKeep();
    } catch (error) {
      this.#index.set(conversation.id, summary(conversation));
      this.#memory.set(conversation.id, structuredClone(conversation));
      if (database) this.onFailure(error);
    }
  }

  /** Once there is something to lose: browsers clear the storage of pages that did not ask. */
  #askToKeep() {
    if (this.#askedToKeep) return;
    this.#askedToKeep = true;
    navigator.storage?.persist?.().catch(() => {}); // then it is kept as long as there is room
  }

  async get(id) {
    if (this.#memory.has(id)) return structuredClone(this.#memory.get(id));
    return this.#read((store) => store.get(id));
  }

  async remove(id) {
    this.#memory.delete(id);
    this.#index.delete(id);
    const database = await this.#opened;
    if (!database) return;
    await done(database.transaction(STORE, "readwrite"), (store) => store.delete(id));
    this.#channel.postMessage(id);
  }

  /** Every conversation, latest first. */
  async all() {
    const stored = (await this.#read((store) => store.getAll())) ?? [];
    const rest = stored.filter(({ id }) => !this.#memory.has(id));
    return [...this.#memory.values(), ...rest].sort((a, b) => b.updated - a.updated);
  }

  /** `{ id, title, updated }` of those with every word in the title or a message, latest first. */
  async find(words) {
    await this.ready;
    return [...this.#index.values()]
      .filter(({ haystack }) => words.every((word) => haystack.includes(word)))
      .sort((a, b) => b.updated - a.updated);
  }

  async #fillIndex() {
    for (const conversation of await this.all()) this.#index.set(conversation.id, summary(conversation));
  }

  async #changedElsewhere(id) {
    const conversation = await this.get(id);
    if (conversation) this.#index.set(id, summary(conversation));
    else this.#index.delete(id);
    this.dispatchEvent(new CustomEvent("change", { detail: id }));
  }

  async #read(query) {
    const database = await this.#opened;
    if (!database) return undefined;
    return done(database.transaction(STORE, "readonly"), query);
  }
}

/** What the list and the search need, so that neither reads the database again. */
function summary(conversation) {
  const { id, title, updated, messages } = conversation;
  const texts = [title, ...Object.values(messages).map(textOf)];
  return { id, title, updated, haystack: texts.join("\n").toLowerCase() };
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("jaxchat", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Run one query; its result counts only once the transaction has been committed. */
function done(transaction, query) {
  return new Promise((resolve, reject) => {
    const request = query(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? request.error);
    transaction.onerror = () => reject(transaction.error ?? request.error);
  });
}

/** For what may be lost: a full or forbidden storage is not an error here. */
export const small = forgiving(() => localStorage);

/** The same, forgotten with the tab. */
export const tabOnly = forgiving(() => sessionStorage);

/** Under which key the browser keeps `name`, as the event "storage" of the other tabs tells. */
export const storageKey = (name) => `jaxchat.${name}`;

function forgiving(storage) {
  return {
    get(name) {
      try {
        return JSON.parse(storage().getItem(storageKey(name)));
      } catch {
        return null;
      }
    },
    set(name, value) {
      try {
        if (value === null || value === "") storage().removeItem(storageKey(name));
        else storage().setItem(storageKey(name), JSON.stringify(value));
      } catch {
        // the value still holds until the page is closed
      }
    },
  };
}
