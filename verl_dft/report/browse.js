"use strict";
// Everything that a model wrote reaches the page through textContent, so that it can only ever be text.
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 20;
const TESTS = {
  all: () => true,
  correct: (s) => s.grade === "correct",
  wrong: (s) => s.grade === "wrong",
  no_answer: (s) => s.grade === "no_answer",
  ungraded: (s) => s.grade === "timeout" || s.grade === "error",
  truncated: (s) => s.finish === "length",
  disagreeing: (s) => (s.grade === "correct") !== (s.qwen === "correct"),
};
const byId = (id) => document.getElementById(id);
let page = 0;

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function readAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  const filter = state.get("filter");
  byId("filter").value = Array.from(byId("filter").options, (o) => o.value).includes(filter) ? filter : "all";
  byId("find").value = state.get("find") || "";
  page = Math.max(0, (parseInt(state.get("page"), 10) || 1) - 1);
}

function writeAddress() {
  const state = new URLSearchParams({ filter: byId("filter").value, find: byId("find").value, page: page + 1 });
  try {
    history.replaceState(null, "", "#" + state);
  } catch (error) {
    // A browser may refuse it for a local file; the page works without.
  }
}

function matching() {
  const test = TESTS[byId("filter").value];
  const words = byId("find").value.toLowerCase();
  const found = [];
  for (const problem of data.problems) {
    if (words && ![problem.id, problem.question, problem.gold].some((t) => (t || "").toLowerCase().includes(words)))
      continue;
    const samples = problem.samples.filter(test);
    if (samples.length) found.push({ problem, samples });
  }
  return found;
}

function sampleElement(sample) {
  const edge = sample.grade === "correct" || sample.grade === "wrong" ? sample.grade : "other";
  const box = element("details", undefined, edge);
  const parts = [`sample ${sample.index}`, sample.grade.replace("_", " ")];
  if (data.has_qwen) parts.push(`qwen: ${sample.qwen.replace("_", " ")}`);
  if (sample.answer !== null) parts.push(`answer ${sample.answer}`);
  parts.push(`${sample.tokens} tokens`);
  if (sample.finish === "length") parts.push("cut off");
  box.append(element("summary", parts.join(" · ")));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    box.append(element("p", `decided by: ${sample.rule}${sample.detail ? ` (${sample.detail})` : ""}`, "quiet"));
    box.append(element("pre", sample.response));
  });
  return box;
}

function problemElement({ problem, samples }) {
  const box = element("section");
  box.append(element("h2", problem.id));
  const right = problem.samples.filter(TESTS.correct).length;
  const level = problem.level === null ? "" : ` · level ${problem.level}`;
  box.append(element("p", `gold ${problem.gold}${level} · ${right} of ${problem.samples.length} correct`, "quiet"));
  if (problem.question) box.append(element("pre", problem.question, "question"));
  for (const sample of samples) box.append(sampleElement(sample));
  return box;
}

function render() {
  const found = matching();
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  page = Math.min(page, pages - 1);
  const count = found.reduce((sum, each) => sum + each.samples.length, 0);
  byId("shown").textContent = `${count} samples of ${found.length} problems · page ${page + 1} of ${pages}`;
  byId("list").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(problemElement));
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
}

function show(newPage) {
  page = newPage;
  render();
  writeAddress();
}

data.problems.forEach((problem) => {
  problem.samples = problem.samples.map((row) => Object.fromEntries(data.fields.map((name, i) => [name, row[i]])));
});
byId("filter").addEventListener("change", () => show(0));
byId("find").addEventListener("input", () => show(0));
byId("previous").addEventListener("click", () => show(page - 1));
byId("next").addEventListener("click", () => show(page + 1));
byId("open").addEventListener("click", () => {
  const boxes = document.querySelectorAll("#list details");
  const open = Array.from(boxes).some((box) => !box.open);
  boxes.forEach((box) => (box.open = open));
});
window.addEventListener("hashchange", () => {
  readAddress();
  render();
});
readAddress();
render();
if (new URLSearchParams(location.hash.slice(1)).get("open")) byId("open").click();
