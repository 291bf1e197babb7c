/** The page's state, and its reactions to the user. */

import { grow, requestOf } from "./answering.js";
import * as api from "./api.js";
import { ask, byId, download, make } from "./dom.js";
import { MessageView } from "./messages.js";
import { buildSettings, editSettings } from "./settings.js";
import * as store from "./store.js";

/**
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {import("./store.js").Message} Message
 */

const SAVE_MS = 1000;
const LOAD_MS = 1000;
// The server needs a moment to count a new answer.
const START_MS = 200;

/** @type {Conversation[]} */
let conversations = [];
/** @type {Conversation} */
let current = store.newConversation();
/** @type {api.Model[]} */
let models = [];
/** The answers that arrive, by conversation.
 * @type {Map<string, {controller: AbortController, message: Message}>} */
const running = new Map();
/** @type {MessageView[]} */
let views = [];
let isFrameDue = false;

const log = byId("log"), input = byId("input");

// --- the page shows the state -------------------------------------------------------------------------------

function showAll() {
  showConversations();
  showMessages();
  showControls();
}

function showConversations() {
  byId("conversations").replaceChildren(...conversations.map((conversation) => {
    const isCurrent = conversation === current;
    const label = conversation.title || "Untitled";
    const button = make("button", {
      type: "button", class: "quiet", "aria-current": isCurrent ? "true" : undefined,
      title: label, click: () => open(conversation),
    }, label);
    return make("li", { class: running.has(conversation.id) ? "running" : undefined }, button);
  }));
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} – precast` : "precast";
}

function showMessages() {
  views = current.messages.map((message) => new MessageView(message, { edit, regenerate }));
  byId("messages").replaceChildren(...views.map((view) => view.node));
  byId("empty").hidden = views.length > 0;
  updateMessages();
  log.scrollTop = log.scrollHeight;
}

function updateMessages() {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const answer = running.get(current.id);
  views.forEach((view, index) => {
    const isLast = index === views.length - 1;
    if (answer && !isLast && view.isSettled) return;
    view.update({ isRunning: view.message === answer?.message, isBusy: answer !== undefined, isLast });
    view.isSettled = answer !== undefined;
  });
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** Show the messages again at the next frame, however many chunks arrive until then. */
function scheduleUpdate() {
  if (isFrameDue) return;
  isFrameDue = true;
  requestAnimationFrame(() => {
    isFrameDue = false;
    updateMessages();
  });
}

function showControls() {
  const isBusy = running.has(current.id);
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  byId("send").disabled = input.value.trim() === "" || !current.model;
  byId("delete").disabled = byId("rename").disabled = byId("export").disabled = current.messages.length === 0;
  byId("model").value = current.model;
  byId("open-settings").classList.toggle("changed", Boolean(current.system.trim()) || Object.keys(current.sampling).length > 0);
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + input.offsetHeight - input.clientHeight}px`;
}

/** Show a problem of the page as a whole; an empty text hides it. */
function notice(/** @type {string} */ text) {
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
}

/** Tell screen readers. */
function announce(/** @type {string} */ text) {
  byId("status").textContent = text;
}

function toggleMenu(/** @type {boolean} */ isOpen) {
  document.body.classList.toggle("menu-open", isOpen);
  byId("open-menu").setAttribute("aria-expanded", String(isOpen));
  byId("main").inert = isOpen;
  if (isOpen) byId("close-menu").focus();
}

// --- conversations ------------------------------------------------------------------------------------------

/** Keep a conversation, or say why that fails. */
function save(/** @type {Conversation} */ conversation) {
  conversation.updated = Date.now();
  try {
    store.save(conversation);
    notice("");
  } catch {
    notice("This browser has no room for the conversation; export it, or delete others.");
  }
}

function open(/** @type {Conversation} */ conversation) {
  current = conversation;
  if (models.length && !models.some(({ id }) => id === current.model)) current.model = models[0].id;
  toggleMenu(false);
  showAll();
  showLoad();
  input.focus();
}

async function rename() {
  const title = await ask({ title: "Rename the conversation", agree: "Rename", value: current.title });
  if (!title?.trim()) return;
  current.title = title.trim();
  save(current);
  showConversations();
}

async function remove() {
  const doomed = current;
  const agreed = await ask({
    title: "Delete the conversation?", text: `“${doomed.title}” cannot be restored.`, agree: "Delete", isDanger: true,
  });
  if (agreed === null) return;
  running.get(doomed.id)?.controller.abort();
  store.remove(doomed.id);
  conversations = conversations.filter((one) => one !== doomed);
  open(store.newConversation(doomed));
}

function exportCurrent() {
  download(`${current.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`, current);
}

/** Take over what another tab has changed. */
function adopt(/** @type {StorageEvent} */ event) {
  const id = store.idOf(event.key);
  if (id === null || running.has(id)) return;
  const changed = store.load(id);
  conversations = [...(changed ? [changed] : []), ...conversations.filter((one) => one.id !== id)]
    .sort((a, b) => b.updated - a.updated);
  if (current.id === id) current = changed ?? store.newConversation(current);
  if (current.id === id || !changed) showAll();
  else showConversations();
}

// --- answers ------------------------------------------------------------------------------------------------

function send() {
  const content = input.value.trim();
  if (!content || running.has(current.id) || !current.model) return;
  input.value = "";
  current.messages.push({ role: "user", content });
  if (!conversations.includes(current)) conversations.unshift(current);
  answer(current);
}

/** Let the model answer a conversation. */
async function answer(/** @type {Conversation} */ conversation) {
  /** @type {Message} */
  const message = { role: "assistant", content: "", model: conversation.model };
  const request = requestOf(conversation), controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation.id, { controller, message });
  save(conversation);
  showAll();
  setTimeout(showLoad, START_MS);
  announce("The model answers.");
  const saving = setInterval(() => save(conversation), SAVE_MS);
  const error = await grow(message, request, controller.signal, scheduleUpdate);
  clearInterval(saving);
  running.delete(conversation.id);
  if (conversations.includes(conversation)) save(conversation);
  finish(conversation, message, error);
}

function finish(/** @type {Conversation} */ conversation, /** @type {Message} */ message, /** @type {unknown} */ error) {
  announce(message.error ?? (message.finish === "stopped" ? "Stopped." : "The answer is complete."));
  showConversations();
  if (conversation === current) {
    updateMessages();
    showControls();
  }
  showLoad();
  if (error instanceof api.ApiError && error.status === 401) changeKey(error.message);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

/** Replace a message's text; a user's message is sent again. */
function edit(/** @type {Message} */ message, /** @type {string} */ content) {
  message.content = content;
  if (message.role === "user") {
    current.messages.length = current.messages.indexOf(message) + 1;
    answer(current);
  } else {
    save(current);
    updateMessages();
  }
}

/** Answer once more: the last answer goes. */
function regenerate(/** @type {Message} */ message) {
  if (message.role === "assistant") current.messages.pop();
  answer(current);
}

// --- the server ---------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    models = await api.models();
    notice(models.length ? "" : "The server has no model.");
  } catch (error) {
    if (error instanceof api.ApiError && error.status === 401) return changeKey(error.message);
    notice(`${/** @type {Error} */ (error).message} Reload the page to try again.`);
    return undefined;
  }
  byId("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  if (!models.some(({ id }) => id === current.model)) current.model = models[0]?.id ?? "";
  showControls();
  return showLoad();
}

/** Show the load of the model; repeat that while an answer arrives. */
async function showLoad() {
  if (!current.model) return;
  try {
    const { running: busy, waiting } = await api.load(current.model);
    byId("load").textContent = busy || waiting ? `${busy} running · ${waiting} waiting` : "idle";
  } catch {
    byId("load").textContent = "";
  }
}

async function changeKey(/** @type {string} */ text) {
  if (byId("question").open) return;
  const key = await ask({
    title: "API key", text, agree: "Use the key", value: api.readKey(), type: "password", pattern: "[!-~]*",
  });
  if (key === null) return;
  api.saveKey(key);
  await loadModels();
}

// --- events -------------------------------------------------------------------------------------------------

/** @type {[string, string, (event: any) => void][]} */
const EVENTS = [
  ["new", "click", () => open(store.newConversation(current))],
  ["open-menu", "click", () => toggleMenu(true)],
  ["close-menu", "click", () => toggleMenu(false)],
  ["shade", "click", () => toggleMenu(false)],
  ["rename", "click", rename],
  ["delete", "click", remove],
  ["export", "click", exportCurrent],
  ["export-all", "click", () => download("conversations.json", conversations)],
  ["open-key", "click", () => changeKey("Some servers require a key. The page forgets the key when its tab closes.")],
  ["open-settings", "click", openSettings],
  ["model", "change", (event) => { current.model = event.target.value; keepSettings(); showLoad(); }],
  ["stop", "click", () => { stop(); input.focus(); }],
  ["input", "input", showControls],
  ["input", "keydown", onInputKey],
  ["composer", "submit", (event) => { event.preventDefault(); send(); }],
];

async function openSettings() {
  if (await editSettings(current)) keepSettings();
}

function keepSettings() {
  if (current.messages.length) save(current);
  showControls();
}

function onInputKey(/** @type {KeyboardEvent} */ event) {
  // An input method uses Enter to accept a word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

function onKey(/** @type {KeyboardEvent} */ event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open], [popover]:popover-open")) return;
  if (document.body.classList.contains("menu-open")) {
    toggleMenu(false);
    byId("open-menu").focus();
  } else stop();
}

function start() {
  buildSettings();
  for (const [id, kind, react] of EVENTS) byId(id).addEventListener(kind, react);
  for (const button of byId("menu").querySelectorAll("button")) {
    button.addEventListener("click", () => byId("menu").hidePopover());
  }
  for (const button of document.querySelectorAll(".cancel")) {
    button.addEventListener("click", () => button.closest("dialog")?.close());
  }
  document.addEventListener("keydown", onKey);
  addEventListener("storage", adopt);
  matchMedia("(max-width: 46rem)").addEventListener("change", () => toggleMenu(false));
  addEventListener("pagehide", () => {
    for (const id of running.keys()) conversations.filter((one) => one.id === id).forEach(save);
  });
  setInterval(() => { if (running.size && !document.hidden) showLoad(); }, LOAD_MS);
  readConversations();
  showAll();
  loadModels();
}

function readConversations() {
  try {
    conversations = store.loadAll();
  } catch {
    notice("This browser keeps no data for this page: conversations last until the page closes.");
  }
  for (const { messages } of conversations) {
    const last = messages.at(-1);
    if (last?.role === "assistant" && !last.finish && !last.error) last.finish = "interrupted";
  }
  current = conversations[0] ?? current;
}

start();
