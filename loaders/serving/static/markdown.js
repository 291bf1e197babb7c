/**
 * A small renderer of Markdown. It builds elements and text nodes; no text is ever parsed as HTML.
 *
 * Blocks: paragraphs, headings, fenced code, lists, quotes, tables, rules. Spans: code, emphasis, links. Every reader
 * takes a time that grows linearly with its text, whatever the text.
 */

import { copyButton, make } from "./dom.js";
import { spans } from "./spans.js";

/**
 * @typedef {{kind: string, raw: string, text?: string, level?: number, language?: string, blocks?: Block[],
 *     items?: Block[][], start?: number | null, rows?: string[][], align?: string[]}} Block
 * @typedef {(lines: string[], at: number, depth: number) => [Omit<Block, "raw">, number] | null} Reader
 *     returns the block that begins at a line, and the line after it
 */

const DEEPEST = 8;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;

/** @type {Reader[]} */
const READERS = [readCode, readHeading, readRule, readQuote, readList, readTable, readParagraph];

/**
 * Return the blocks of a text.
 * @param {string} text
 */
export const parse = (text) => blocksOf(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);

/**
 * @param {string[]} lines
 * @param {number} depth
 * @returns {Block[]}
 */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = first(READERS, lines, at, depth);
    blocks.push({ ...block, raw: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

/** Return the result of the first reader that accepts a line; the last one accepts every line. */
function first(/** @type {Reader[]} */ readers, lines, at, depth) {
  for (const reader of readers) {
    const found = reader(lines, at, depth);
    if (found) return found;
  }
  throw new Error("no reader");
}

const isBlank = (/** @type {string} */ line) => line.trim() === "";
const indentOf = (/** @type {string} */ line) => line.length - line.trimStart().length;

/** @type {Reader} */
function readCode(lines, at) {
  const open = /^( *)(`{3,}|~{3,})([^`]*)$/.exec(lines[at]);
  if (!open) return null;
  const [, indent, fence, info] = open;
  let end = at + 1;
  while (end < lines.length && !isClosing(lines[end], fence)) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, indentOf(line))));
  const language = info.trim().split(" ")[0];
  return [{ kind: "code", language, text: code.join("\n") }, Math.min(end + 1, lines.length)];
}

/** @param {string} line @param {string} fence */
function isClosing(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** @type {Reader} */
function readHeading(lines, at) {
  const found = HEADING.exec(lines[at]);
  return found && [{ kind: "heading", level: found[1].length, text: found[2].trim().replace(/ #+$/, "") }, at + 1];
}

/** @type {Reader} */
function readRule(lines, at) {
  return RULE.test(lines[at]) ? [{ kind: "rule" }, at + 1] : null;
}

/** @type {Reader} */
function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === at || depth >= DEEPEST) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ kind: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

/** @type {Reader} */
function readList(lines, at, depth) {
  const opening = MARKER.exec(lines[at]);
  if (!opening || depth >= DEEPEST) return null;
  const kind = opening[2].slice(-1), items = [];
  for (;;) {
    const marker = at < lines.length ? MARKER.exec(lines[at]) : null;
    if (!marker || marker[2].slice(-1) !== kind || RULE.test(lines[at])) break;
    const end = endOfItem(lines, at + 1, marker[1].length);
    const head = lines[at].slice(marker[0].length);
    items.push(blocksOf([head, ...outdented(lines.slice(at + 1, end), marker[0].length)], depth + 1));
    at = end;
    while (at < lines.length && isBlank(lines[at]) && MARKER.test(lines[at + 1] ?? "")) at += 1;
  }
  const start = /\d/.test(opening[2]) ? parseInt(opening[2], 10) : null;
  return [{ kind: "list", start, items }, at];
}

/** Return the line after a list's item: a line that is neither indented nor continues the item's paragraph. */
function endOfItem(/** @type {string[]} */ lines, /** @type {number} */ at, /** @type {number} */ indent) {
  let last = at, isAfterBlank = false;
  for (; at < lines.length; at += 1) {
    if (isBlank(lines[at])) {
      isAfterBlank = true;
      continue;
    }
    const isInside = indentOf(lines[at]) >= indent + 2;
    if (!isInside && (isAfterBlank || startsBlock(lines[at]))) break;
    last = at + 1;
    isAfterBlank = false;
  }
  return last;
}

/** @param {string[]} lines @param {number} most */
const outdented = (lines, most) => lines.map((line) => line.slice(Math.min(most, indentOf(line))));

/** @type {Reader} */
function readTable(lines, at) {
  if (!lines[at].includes("|") || !(lines[at + 1] ?? "").includes("-")) return null;
  const head = cells(lines[at]), rule = cells(lines[at + 1]);
  if (head.length !== rule.length || !rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !isBlank(lines[end])) end += 1;
  const rows = [head, ...lines.slice(at + 2, end).map(cells)].map((row) => head.map((_, column) => row[column] ?? ""));
  return [{ kind: "table", rows, align: rule.map(alignment) }, end];
}

/** @param {string} line */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** @param {string} rule */
const alignment = (rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "centre" : "right") : "left");

/** @type {Reader} */
function readParagraph(lines, at) {
  let end = at + 1;
  const continues = () => !isBlank(lines[end]) && !startsBlock(lines[end]) && !readTable(lines, end, 0);
  while (end < lines.length && continues()) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [{ kind: "paragraph", text }, end];
}

const startsBlock = (/** @type {string} */ line) =>
  /^ *(`{3,}|~{3,})[^`]*$/.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || MARKER.test(line);

// --- elements -----------------------------------------------------------------------------------------------

/** @type {Record<string, (block: Block) => HTMLElement>} */
const RENDERERS = {
  paragraph: ({ text = "" }) => make("p", {}, spans(text)),
  // The page has headings of its own, so a message begins at the third level.
  heading: ({ text = "", level = 1 }) => make(`h${Math.min(level + 2, 6)}`, {}, spans(text)),
  rule: () => make("hr"),
  quote: ({ blocks = [] }) => make("blockquote", {}, blocks.map(render)),
  code: renderCode,
  list: ({ items = [], start }) => make(
    start === null ? "ul" : "ol", { start: start === null || start === 1 ? undefined : start },
    items.map((item) => make("li", {}, item.map(renderInItem)))),
  table: renderTable,
};

/** @param {Block} block @returns {HTMLElement} */
const render = (block) => RENDERERS[block.kind](block);

/** @param {Block} block @param {number} index @param {Block[]} item */
const renderInItem = (block, index, item) =>
  (block.kind === "paragraph" && item.filter(({ kind }) => kind === "paragraph").length === 1
    ? make("span", {}, spans(block.text ?? "")) : render(block));

/** @param {Block} block */
function renderCode({ text = "", language }) {
  const code = make("code", {}, text);
  const button = copyButton(() => code.textContent ?? "", "Copy code");
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"), button);
  // A scrollable block must be reachable by keyboard.
  const body = make("pre", { tabindex: 0, role: "region", "aria-label": `Code: ${language || "text"}` }, code);
  return make("div", { class: "code", dir: "ltr" }, head, body);
}

/** @param {Block} block */
function renderTable({ rows = [], align = [] }) {
  const line = (/** @type {string[]} */ row, /** @type {string} */ tag) =>
    make("tr", {}, row.map((cell, column) => make(tag, { class: align[column] }, spans(cell))));
  const [head, ...body] = rows;
  const table = make("table", {}, make("thead", {}, line(head, "th")),
    make("tbody", {}, body.map((row) => line(row, "td"))));
  return make("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table);
}

/** @type {WeakMap<Element, Block[]>} */
const shown = new WeakMap();

/**
 * Show a text, which may be longer than the one before. Only blocks that have changed are replaced.
 * @param {HTMLElement} container
 * @param {string} text
 */
export function show(container, text) {
  const blocks = parse(text), before = shown.get(container) ?? [];
  // A live collection would count its elements again after each change.
  const nodes = [...container.children];
  blocks.forEach((block, index) => {
    const old = before[index], node = nodes[index];
    if (!old) container.append(render(block));
    else if (old.kind === "code" && block.kind === "code" && old.language === block.language) {
      const code = /** @type {Element} */ (node.querySelector("code"));
      if (old.text !== block.text) code.textContent = block.text ?? "";
    } else if (old.raw !== block.raw) node.replaceWith(render(block));
  });
  for (const node of nodes.slice(blocks.length)) node.remove();
  shown.set(container, blocks);
}
