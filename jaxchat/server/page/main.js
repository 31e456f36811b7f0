/**
 * The chat page: makes its parts and connects them. Read on in session.js (what happens),
 * conversation.js (what is kept), thread.js (what is seen), api.js (what is asked of the server).
 */

import { ADVICE, ApiError } from "./api.js";
import { Composer } from "./composer.js";
import { textOf } from "./conversation.js";
import { Database } from "./database.js";
import { announce, byId, drawIcons, h, iconButton, isOfInputMethod } from "./dom.js";
import { ModelPicker } from "./models.js";
import { Session } from "./session.js";
import { Settings, settingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";
import { hideCard } from "./tokens.js";
import { download, fileName, readFile, toJson, toMarkdown } from "./transfer.js";

const NOTICE_MS = 12_000;
const ANNOUNCED_CHARS = 600;

const settings = new Settings();
const database = new Database(() =>
  notice("The browser's storage is full or closed: what you write now is lost with this tab. Export what you want to keep."),
);
const session = new Session(database, settings);

drawIcons(document);
const dialog = settingsDialog(settings);
const thread = new Thread(session);
let loading = null;
session.loadModels = loadModels;
new Composer(session, settings, thread, notice);
const sidebar = new Sidebar(session, database);
const picker = new ModelPicker(session, settings);

// --- which conversation: the address names it ---------------------------------------------------

session.addEventListener("open", () => {
  const { conversation } = session;
  setAddress(conversation.children.length ? conversation.id : "");
  drawTitle();
});

session.addEventListener("change", () => {
  if (session.conversation.children.length) setAddress(session.conversation.id);
  drawTitle();
});

function setAddress(id) {
  if (location.hash.slice(1) !== id) history.pushState(null, "", id ? `#${id}` : location.pathname);
}

function drawTitle() {
  const { title } = session.conversation;
  byId("title").textContent = title || "New chat";
  document.title = title ? `${title} · jaxchat` : "jaxchat";
  byId("export-menu").hidden = session.conversation.children.length === 0;
}

/** Open the conversation that the address names, or a new one. */
async function openAddress() {
  const id = location.hash.slice(1);
  if (id && (await session.open(id))) return;
  // an address that names nothing must not stay in the way of the back button
  if (id) history.replaceState(null, "", location.pathname);
  session.newChat();
}

addEventListener("popstate", openAddress);

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its fragment would be taken for a conversation
  byId("prompt").focus();
});

// --- what is said to the reader -----------------------------------------------------------------

session.addEventListener("notice", ({ detail }) => notice(detail.text, detail));
session.addEventListener("wait", () => announce(ADVICE.starting));
session.addEventListener("finish", ({ detail }) => announce(announcement(detail)));

function announcement(answer) {
  if (answer.status === "failed") return `No answer. ${ADVICE[answer.error.kind]}`;
  const text = textOf(answer).slice(0, ANNOUNCED_CHARS);
  return answer.status === "stopped" ? `Stopped. ${text}` : `Answer: ${text}`;
}

/** A line above the message box that goes away by itself, unless the reader is at it. With `rows`, it stays. */
function notice(text, { undo = null, rows = [] } = {}) {
  for (const shown of byId("notices").children) if (shown.dataset.text === text) shown.remove();
  const remove = () => {
    const hadFocus = element.contains(document.activeElement);
    element.remove();
    if (hadFocus) byId("prompt").focus();
  };
  const undoButton = undo && h("button", { class: "text-button", type: "button", onclick: () => {
    undo();
    remove();
  } }, "Undo");
  const table = rows.length ? h("dl", { class: "notice-rows" },
    ...rows.flatMap(([name, meaning]) => [h("dt", {}, name), h("dd", {}, meaning)])) : null;
  const element = h("div", { class: "notice", dataset: { text } }, h("p", {}, text), undoButton,
    iconButton("close", "Dismiss", remove), table);
  byId("notices").append(element);
  announce(text);
  const expire = () => (element.matches(":hover, :focus-within") ? setTimeout(expire, NOTICE_MS) : remove());
  if (!table) setTimeout(expire, NOTICE_MS);
}

// --- menus, files, keys -------------------------------------------------------------------------

byId("open-settings").addEventListener("click", () => {
  sidebar.closeDrawer();
  dialog.showModal();
});

byId("export-menu").addEventListener("click", ({ target }) => {
  const { conversation } = session;
  const name = fileName(conversation.title);
  if (target.dataset.export === "json") download(`${name}.json`, "application/json", toJson([conversation]));
  else if (target.dataset.export === "markdown") download(`${name}.md`, "text/markdown", toMarkdown(conversation));
  else return;
  byId("export-menu").open = false;
});

byId("export-all").addEventListener("click", async () => {
  const all = await database.all();
  if (all.length) download("conversations.json", "application/json", toJson(all));
  else notice("There is nothing to export yet.");
});

byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async ({ target }) => {
  try {
    const read = await Promise.all([...target.files].map(readFile));
    await session.adopt(read.flat());
    sidebar.closeDrawer();
  } catch (error) {
    notice(error.message);
  }
  target.value = "";
});

addEventListener("keydown", (event) => {
  if (isOfInputMethod(event)) return;
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && !dialog.open) {
    if (hideCard() || closeMenus() || sidebar.closeDrawer()) return; // an answer that comes goes on
    session.stop();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    session.newChat();
  } else if (command && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    sidebar.startSearch();
  }
});

addEventListener("click", ({ target }) => closeMenus(target));

/** Close the menus in the header that `target` is not in; whether one was open. */
function closeMenus(target = null) {
  const open = [...document.querySelectorAll("header details[open]")].filter((menu) => !menu.contains(target));
  for (const menu of open) {
    if (menu.contains(document.activeElement)) menu.querySelector("summary").focus();
    menu.open = false;
  }
  return open.length > 0;
}

/** Ask the server for its models; whoever asks while that is under way waits for the same answer. */
function loadModels() {
  loading ??= loadWithNewestKey().catch(explain).finally(() => (loading = null));
  return loading;
}

/** What a key brought that has been replaced meanwhile, be it a refusal, is no answer to the new one. */
async function loadWithNewestKey() {
  for (;;) {
    const { apiKey } = settings.values;
    const failure = await picker.load().then(() => null, (error) => error);
    if (settings.values.apiKey !== apiKey) continue;
    if (failure) throw failure;
    return;
  }
}

function explain(error) {
  if (!(error instanceof ApiError)) throw error;
  notice(`${ADVICE[error.kind]} ${error.message}`);
}

settings.addEventListener("change", ({ detail }) => detail === "apiKey" && loadModels());
addEventListener("online", loadModels);

await Promise.all([openAddress(), loadModels()]);
