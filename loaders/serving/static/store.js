/** Conversations, kept in the browser: one entry of localStorage each, so that tabs do not overwrite each other's. */

/**
 * @typedef {{firstMs?: number, tokens?: number, perSecond?: number, prompt?: number, cached?: number, queueMs?: number}} Figures
 * @typedef {{role: "user" | "assistant", content: string, reasoning?: string, model?: string, finish?: string,
 *     error?: string, figures?: Figures}} Message
 * @typedef {{id: string, title: string, updated: number, model: string, system: string,
 *     sampling: Record<string, number | string[]>, messages: Message[]}} Conversation
 */

const PREFIX = "precast.chat.";
const TITLE_LENGTH = 60;

/**
 * Return an empty conversation.
 * @param {Partial<Conversation>} like  its model, system prompt and sampling settings are taken over
 * @returns {Conversation}
 */
export function newConversation({ model = "", system = "", sampling = {} } = {}) {
  // crypto.randomUUID is missing over plain HTTP from another machine.
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updated: Date.now(), model, system, sampling: { ...sampling }, messages: [] };
}

/**
 * Return all conversations, the latest first. Entries that are no conversations stay untouched.
 * @returns {Conversation[]}
 */
export function loadAll() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => parse(localStorage.getItem(key))).filter((one) => one !== null);
  return /** @type {Conversation[]} */ (found).sort((a, b) => b.updated - a.updated);
}

/**
 * @param {string} id
 * @returns {Conversation | null}
 */
export const load = (id) => parse(localStorage.getItem(PREFIX + id));

/**
 * Return the id of a conversation from the key of its entry; null for other entries.
 * @param {string | null} key
 */
export const idOf = (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null);

/**
 * Keep a conversation.
 * @param {Conversation} conversation
 * @throws {DOMException} the browser has no room, or keeps nothing for this page
 */
export function save(conversation) {
  if (!conversation.title) conversation.title = titleOf(conversation);
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

/** @param {string} id */
export const remove = (id) => localStorage.removeItem(PREFIX + id);

/** @param {Conversation} conversation */
function titleOf({ messages }) {
  const line = (messages[0]?.content ?? "").trim().split("\n")[0];
  const letters = [...line];
  return letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH - 1).join("")}…` : line;
}

/** @param {string | null} text */
function parse(text) {
  try {
    const value = JSON.parse(text ?? "");
    return isConversation(value) ? value : null;
  } catch {
    return null;
  }
}

/** @param {any} value */
function isConversation(value) {
  const texts = [value?.id, value?.title, value?.model, value?.system];
  return texts.every((text) => typeof text === "string") && typeof value.updated === "number"
    && typeof value.sampling === "object" && value.sampling !== null
    && Array.isArray(value.messages) && value.messages.every(isMessage);
}

/** @param {any} value */
function isMessage(value) {
  const texts = [value?.reasoning, value?.model, value?.finish, value?.error];
  return ["user", "assistant"].includes(value?.role) && typeof value.content === "string"
    && texts.every((text) => text === undefined || typeof text === "string")
    && Object.values(value.figures ?? {}).every((figure) => typeof figure === "number");
}
