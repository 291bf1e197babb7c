/** Markdown within a line: code, emphasis, links. */

import { make } from "./dom.js";

/** Delimiters of emphasis, the longest first, and their elements from the outside in. */
const EMPHASIS = [
  { mark: "***", tags: ["strong", "em"] },
  { mark: "**", tags: ["strong"] },
  { mark: "__", tags: ["strong"] },
  { mark: "~~", tags: ["del"] },
  { mark: "*", tags: ["em"] },
  { mark: "_", tags: ["em"] },
];
const DEEPEST = 6;
const SPECIAL = /[\\`*_~[!<\nh]/g;
const LINK = /!?\[([^[\]\n]*)\]\(<?((?:https?:\/\/|mailto:)[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?: "[^"\n]*")?\)/y;
const ADDRESS = /<((?:https?:\/\/|mailto:)[^\s<>]*)>/y;
const BARE = /https?:\/\/[^\s<>"`|\\]*/y;
const PUNCTUATION = ".,;:!?'\"*_~)]";
const WORD = /[\p{L}\p{N}_]/u;

/**
 * @typedef {{text: string, depth: number, isInLink: boolean, absent: Set<string>}} Context
 *     absent: delimiters without a partner in the rest of the text, so that nothing is searched for twice
 * @typedef {(at: number, context: Context) => [Node[], number] | null} Reader
 *     returns the nodes that begin at a place, and the place after them
 */

/** @type {Record<string, Reader[]>} */
const READERS = {
  "\\": [readEscape],
  "`": [readCode],
  "*": [readEmphasis],
  _: [readEmphasis],
  "~": [readEmphasis],
  "[": [readLink],
  "!": [readLink],
  "<": [readAddress],
  "\n": [(at) => [[make("br")], at + 1]],
  h: [readBare],
};

/**
 * Return the nodes of a text.
 * @param {string} text
 * @param {number} depth  levels of emphasis around it
 * @param {boolean} isInLink
 * @returns {Node[]}
 */
export function spans(text, depth = 0, isInLink = false) {
  /** @type {Context} */
  const context = { text, depth, isInLink, absent: new Set() };
  const nodes = [];
  let plain = "", at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const place = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, place);
    at = place;
    if (at === text.length) break;
    const found = read(READERS[text[at]], at, context);
    if (found) {
      if (plain) nodes.push(document.createTextNode(plain));
      plain = "";
      nodes.push(...found[0]);
      at = found[1];
    } else {
      // A run of delimiters that opens nothing is text as a whole.
      const next = "*_~`".includes(text[at]) ? endOfRun(text, at) : at + 1;
      plain += text.slice(at, next);
      at = next;
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

/** @param {Reader[]} readers @param {number} at @param {Context} context */
function read(readers, at, context) {
  for (const reader of readers) {
    const found = reader(at, context);
    if (found) return found;
  }
  return null;
}

/** @param {string} text @param {number} at */
function endOfRun(text, at) {
  let end = at + 1;
  while (end < text.length && text[end] === text[at]) end += 1;
  return end;
}

/** @type {Reader} */
function readEscape(at, { text }) {
  const next = text[at + 1] ?? "";
  return /[!-/:-@[-`{-~]/.test(next) ? [[document.createTextNode(next)], at + 2] : null;
}

/** @type {Reader} */
function readCode(at, { text, absent }) {
  const begin = endOfRun(text, at), mark = text.slice(at, begin);
  if (absent.has(mark)) return null;
  for (let end = text.indexOf("`", begin); end !== -1;) {
    const next = endOfRun(text, end);
    if (next - end === mark.length) {
      const code = text.slice(begin, end);
      const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
      return [[make("code", {}, isPadded ? code.slice(1, -1) : code)], next];
    }
    end = text.indexOf("`", next);
  }
  absent.add(mark);
  return null;
}

/** @type {Reader} */
function readEmphasis(at, context) {
  const { text, depth, isInLink, absent } = context;
  if (depth >= DEEPEST || endOfRun(text, at) - at > 3) return null;
  for (const { mark, tags } of EMPHASIS) {
    const begin = at + mark.length;
    if (!text.startsWith(mark, at) || absent.has(mark) || !opens(text, at, begin)) continue;
    const end = closing(text, begin, mark);
    if (end === -1) {
      absent.add(mark);
      continue;
    }
    const inner = spans(text.slice(begin, end), depth + 1, isInLink);
    const node = tags.reduceRight((/** @type {Node[]} */ nodes, tag) => [make(tag, {}, nodes)], inner);
    return [node, end + mark.length];
  }
  return null;
}

/** Return true if a delimiter may open: a letter follows, and no word is split by underscores. */
const opens = (/** @type {string} */ text, /** @type {number} */ at, /** @type {number} */ begin) =>
  begin < text.length && !/\s/.test(text[begin]) && !(text[at] === "_" && at > 0 && WORD.test(text[at - 1]));

/**
 * Return the place of the delimiter that closes; -1 if there is none.
 * @param {string} text
 * @param {number} from
 * @param {string} mark
 */
function closing(text, from, mark) {
  for (let at = text.indexOf(mark, from + 1); at !== -1;) {
    const next = endOfRun(text, at), length = next - at;
    const isOfLength = length === mark.length || (length === 3 && mark !== "~~");
    const splitsWord = mark[0] === "_" && next < text.length && WORD.test(text[next]);
    // Of three marks, the first ones belong to the emphasis inside.
    if (isOfLength && !/\s/.test(text[at - 1]) && text[at - 1] !== "\\" && !splitsWord) return next - mark.length;
    at = text.indexOf(mark, next);
  }
  return -1;
}

/** @type {Reader} */
function readLink(at, { text, depth, isInLink }) {
  const found = matchAt(LINK, text, at);
  if (!found || isInLink || depth >= DEEPEST) return null;
  return [[link(found[2], spans(found[1] || found[2], depth + 1, true))], at + found[0].length];
}

/** @type {Reader} */
function readAddress(at, { text, isInLink }) {
  const found = isInLink ? null : matchAt(ADDRESS, text, at);
  return found && [[link(found[1], [document.createTextNode(found[1])])], at + found[0].length];
}

/** @type {Reader} */
function readBare(at, { text, isInLink }) {
  const isInWord = at > 0 && WORD.test(text[at - 1]);
  const found = isInLink || isInWord ? null : matchAt(BARE, text, at);
  if (!found) return null;
  let end = at + found[0].length;
  while (PUNCTUATION.includes(text[end - 1])) end -= 1;
  const address = text.slice(at, end);
  return address.length < 10 ? null : [[link(address, [document.createTextNode(address)])], end];
}

/** @param {RegExp} pattern  a sticky one @param {string} text @param {number} at */
function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** @param {string} address @param {Node[]} nodes */
const link = (address, nodes) =>
  make("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" }, nodes);
