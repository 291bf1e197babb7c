/** The system prompt and the sampling settings of a conversation, and the form for them. */

import { byId, make } from "./dom.js";

/**
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {{name: string, label: string, hint: string, min?: number, max?: number, isWhole?: boolean}} Setting
 */

/** The settings that are numbers, by the names of the API.
 * @type {Setting[]} */
const NUMBERS = [
  { name: "temperature", label: "Temperature", hint: "0 to 2; 0 takes the likeliest token", min: 0, max: 2 },
  { name: "top_p", label: "Top p", hint: "0 to 1; share of probability kept", min: 0, max: 1 },
  { name: "top_k", label: "Top k", hint: "tokens kept; 0 keeps all", min: 0, isWhole: true },
  { name: "min_p", label: "Min p", hint: "0 to 1, relative to the likeliest token", min: 0, max: 1 },
  { name: "max_tokens", label: "Max tokens", hint: "length of the answer", min: 1, isWhole: true },
  { name: "seed", label: "Seed", hint: "makes answers repeatable", min: 0, max: Number.MAX_SAFE_INTEGER, isWhole: true },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 has no effect", min: 0.01, max: 10 },
  { name: "presence_penalty", label: "Presence penalty", hint: "−2 to 2", min: -2, max: 2 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "−2 to 2", min: -2, max: 2 },
];

/** Build the fields of the form. */
export function buildSettings() {
  const stops = make("textarea", { id: "setting-stop", rows: 2, "aria-describedby": "hint-stop" });
  byId("sampling").append(
    ...NUMBERS.map((setting) => field(setting.name, setting.label, setting.hint, numberInput(setting))),
    field("stop", "Stop texts", "one a line", stops),
  );
  byId("reset").addEventListener("click", () => fill({ system: "", sampling: {} }));
}

/** @param {Setting} setting */
const numberInput = ({ name, min, max, isWhole }) => make("input", {
  id: `setting-${name}`, type: "number", min, max, step: isWhole ? 1 : "any",
  inputmode: isWhole ? "numeric" : "decimal", placeholder: "default", "aria-describedby": `hint-${name}`,
});

/**
 * @param {string} name
 * @param {string} label
 * @param {string} hint
 * @param {HTMLElement} input
 */
const field = (name, label, hint, input) => make("div", { class: "field" },
  make("label", { for: `setting-${name}` }, label), input,
  make("span", { class: "hint", id: `hint-${name}` }, hint));

/**
 * Let the user change the settings of a conversation.
 * @param {Conversation} conversation  the settings go here
 * @returns {Promise<boolean>} true if the user saves them
 */
export function editSettings(conversation) {
  const dialog = byId("settings");
  fill(conversation);
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const isSaved = dialog.returnValue === "save";
      if (isSaved) Object.assign(conversation, read());
      resolve(isSaved);
    }, { once: true });
  });
}

/** @param {Pick<Conversation, "system" | "sampling">} settings */
function fill({ system, sampling }) {
  byId("system").value = system;
  for (const { name } of NUMBERS) byId(`setting-${name}`).value = sampling[name] ?? "";
  byId("setting-stop").value = [sampling.stop ?? []].flat().join("\n");
}

/** @returns {Pick<Conversation, "system" | "sampling">} */
function read() {
  const given = NUMBERS.map(({ name }) => [name, byId(`setting-${name}`).valueAsNumber]);
  /** @type {Record<string, number | string[]>} */
  const sampling = Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
  const stops = byId("setting-stop").value.split("\n").filter((/** @type {string} */ line) => line !== "");
  if (stops.length) sampling.stop = stops;
  return { system: byId("system").value, sampling };
}
