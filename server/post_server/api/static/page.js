// Shows what /v1 returns for the key that the user enters. Texts are inserted as text, never as markup.
"use strict";

const KEY = "post-key";
const PAUSE = 2000;
const byId = (id) => document.getElementById(id);
let timer = null;

class Refused extends Error {}

async function get(path, key) {
  const response = await fetch(path, { headers: { Authorization: `Bearer ${key}` }, cache: "no-store" });
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail || response.statusText;
  throw response.status === 401 ? new Refused(detail) : new Error(detail);
}

function element(name, content, className) {
  const node = document.createElement(name);
  if (content instanceof Node) node.append(content);
  else node.textContent = content === null || content === undefined ? "" : String(content);
  if (className) node.className = className;
  return node;
}

function table(id, columns, items) {
  const head = element("tr", "");
  for (const [title, , kind] of columns) head.append(element("th", title, kind === "number" ? "number" : ""));
  const rows = items.map((item) => {
    const row = element("tr", "");
    for (const [, show, kind] of columns) {
      row.append(element("td", show(item), typeof kind === "function" ? kind(item) : kind));
    }
    return row;
  });
  if (!rows.length) {
    const row = element("tr", "");
    row.append(element("td", "none yet", "none"));
    rows.push(row);
  }
  byId(id).replaceChildren(head, ...rows);
}

const when = (text) => (text ? new Date(text).toLocaleString() : "");
const count = (number) => Number(number).toLocaleString();
const millions = (number) => `${(number / 1e6).toFixed(number < 1e8 ? 1 : 0)}M`;
const short = (text) => text.slice(0, 12);

function progress(job) {
  const shown = document.createElement("span");
  const bar = document.createElement("progress");
  bar.max = 1;
  bar.value = job.progress;
  shown.append(bar, ` ${Math.round(job.progress * 100)} % ${job.stage || ""}`);
  return shown;
}

function outcome(job) {
  if (job.error) return job.error.detail;
  const facts = job.result || job.metrics;
  const shown = ([name, value]) => `${name} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`;
  return Object.entries(facts).filter(([, value]) => typeof value !== "object").slice(0, 6).map(shown).join(", ");
}

const JOBS = [
  ["Job", (job) => job.id, "id"],
  ["Kind", (job) => job.kind],
  ["State", (job) => job.state, (job) => job.state],
  ["Progress", progress],
  ["Outcome", outcome],
  ["Created", (job) => when(job.created_at)],
];
const PROMPTS = [
  ["Prompt", (prompt) => prompt.id, "id"],
  ["Role", (prompt) => prompt.role],
  ["Model", (prompt) => prompt.model_id, "id"],
  ["Length × width", (prompt) => `${prompt.length} × ${prompt.width}`, "number"],
  ["Template", (prompt) => prompt.task.template],
  ["Privacy", (prompt) => (prompt.epsilon === null ? "not stated" : `ε ${prompt.epsilon}, δ ${prompt.delta}`)],
  ["Created", (prompt) => when(prompt.created_at)],
];
const MODELS = [
  ["Model", (model) => model.name],
  ["Role", (model) => model.role],
  ["Architecture", (model) => model.architecture],
  ["Layers", (model) => count(model.layers), "number"],
  ["Width", (model) => count(model.hidden_size), "number"],
  ["Parameters", (model) => millions(model.parameters), "number"],
  ["Hash", (model) => short(model.hash), "id"],
  ["Added", (model) => when(model.created_at)],
];
const DATASETS = [
  ["Dataset", (dataset) => dataset.name],
  ["Kind", (dataset) => dataset.kind],
  ["Rows", (dataset) => count(dataset.rows), "number"],
  ["Labels", (dataset) => (dataset.labels === null ? "none" : dataset.labels.slice(0, 12).join(", ") || "free answers")],
  ["Licence", (dataset) => dataset.licence || "not stated"],
  ["Added", (dataset) => when(dataset.created_at)],
];

async function refresh() {
  const key = sessionStorage.getItem(KEY);
  if (!key) return;
  try {
    const kinds = ["jobs", "prompts", "models", "datasets"];
    const pages = await Promise.all(kinds.map((kind) => get(`/v1/${kind}?limit=50`, key)));
    [JOBS, PROMPTS, MODELS, DATASETS].forEach((columns, index) => table(kinds[index], columns, pages[index].items));
    showError("");
    byId("enter").hidden = true;
    byId("overview").hidden = byId("who").hidden = false;
    byId("live").className = "";
  } catch (error) {
    byId("live").className = "away";
    showError(error.message);
    if (error instanceof Refused) leave();
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, PAUSE);
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

function enter() {
  const key = byId("key").value.trim();
  byId("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(key)) return showError("A key looks like post_…");
  sessionStorage.setItem(KEY, key);
  return refresh();
}

function leave() {
  sessionStorage.removeItem(KEY);
  for (const id of ["jobs", "prompts", "models", "datasets"]) byId(id).replaceChildren();
  byId("overview").hidden = byId("who").hidden = true;
  byId("enter").hidden = false;
}

byId("open").addEventListener("click", enter);
byId("key").addEventListener("keydown", (event) => event.key === "Enter" && enter());
byId("leave").addEventListener("click", () => { showError(""); leave(); });
refresh();
