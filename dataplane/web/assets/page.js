"use strict";
// What the server tells (server-sent events, web/page.py) is put into the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#2f6fed", "#e07a1f", "#1f9d63", "#c0459c", "#0e97b5", "#8a63d2", "#b5890a", "#d64545", "#8b95a5"];
const SECONDS = 300;
const HEIGHT = 210;
const OTHERS = "others";

const wanted = { text: "", sort: "name", limit: 25, chosen: "" };
let source = null;
let last = null; // the last overview, and when it came
let heard = 0;

// ------------------------------------------------------------------------------------------------------- small things

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

const count = (n) => (n === null || n === undefined ? "–" : n < 1e6 ? whole.format(n) : short.format(n));
const rate = (n) => (n === null || n === undefined ? "–" : n < 100 ? one.format(n) : count(n));
const percent = (n) => (n === null || n === undefined ? "–" : `${one.format(100 * n)}%`);
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const seconds = (s) => (s === null || s === undefined ? "–" : s < 1 ? `${whole.format(1000 * s)} ms` : `${short.format(s)} s`);

function span(s) {
  const steps = [[86400, "d"], [3600, "h"], [60, "m"]];
  for (const [size, unit] of steps) if (s >= size) return `${Math.floor(s / size)}${unit}`;
  return `${Math.max(0, Math.floor(s))}s`;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function make(tag, kind, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  node.append(...children);
  return node;
}

// The children of `parent`, one for each item, by their ids: kept where they are, made, moved, taken away.
function keep(parent, items, build, fill) {
  const there = new Map([...parent.children].map((node) => [node.dataset.id, node]));
  let place = parent.firstElementChild;
  for (const item of items) {
    let node = there.get(item.id);
    there.delete(item.id);
    if (!node) {
      node = build(item);
      node.dataset.id = item.id;
    }
    if (node !== place) parent.insertBefore(node, place);
    else place = place.nextElementSibling;
    fill(node, item);
  }
  for (const node of there.values()) node.remove();
}

function width(node, share) {
  node.style.width = `${Math.round(1000 * Math.max(0, Math.min(1, share || 0))) / 10}%`;
}

function state(real) {
  return real.state === "draining" && real.left !== null ? `drains ${span(real.left)}` : real.state;
}

// ------------------------------------------------------------------------------------------------------------ summary

function tellOverview(told) {
  last = told;
  heard = Date.now();
  $("trouble").hidden = !told.trouble;
  put($("trouble"), told.trouble);
  put($("node"), told.node);
  if (told.trouble) {
    health("bad", "no agent");
    return;
  }
  health(told.healthy ? "good" : "bad", told.healthy ? "healthy" : "not healthy");
  $("mode").hidden = false;
  put($("mode"), told.mode);
  document.title = `${told.mode} on ${told.node} – dataplane`;

  put($("rate"), rate(told.rate));
  put($("hits"), `${count(told.hits)} in all`);
  put($("services"), count(told.services));
  put($("backends"), `with ${plural(told.backends, "backend")}`);
  put($("source"), told.counts.source === "probe" ? "probe" : told.counts.source);
  const missed = $("missed");
  missed.classList.toggle("bad", told.counts.missed > 0);
  missed.title = told.counts.text;
  put(missed, told.counts.missed ? `${count(told.counts.missed)} missed` : told.counts.source === "probe" ? "none missed" : "the mode’s own counters");
  put($("draining"), count(told.draining));
  put($("drains"), `${count(told.drains.completed)} completed, ${count(told.drains.expired)} expired`);
  put($("drift"), count(told.drift.objects));
  put($("drifts"), `in ${plural(told.drift.syncs, "sync")}`);
  const { entries, limit, deleted } = told.conntrack;
  put($("conntrack"), count(entries));
  width($("conntrack-bar"), limit ? entries / limit : 0);
  put($("conntrack-note"), limit ? `of ${count(limit)}; ${count(deleted)} deleted` : "");

  const texts = [...told.reasons.texts, ...told.problems.texts];
  const more = told.reasons.more + told.problems.more;
  if (more) texts.push(`… and ${more} more`);
  if (told.seriesLeftOut) texts.push(`${plural(told.seriesLeftOut, "series")} too many: /metrics leaves backends out (metricsMaxSeries)`);
  $("problems").hidden = !texts.length;
  keep($("problem-list"), texts.map((text) => ({ id: text, text })), () => make("li"), (node, { text }) => put(node, text));

  const sync = told.lastSync;
  put($("sync-last"), sync ? `Last: ${sync.cause}, ${sync.result} in ${one.format(sync.milliseconds)} ms (${sync.adds} added, ${sync.sets} set, ${sync.deletes} deleted)` : "");
  tellSyncs("partial", told.syncs.partial, told.syncs.bounds);
  tellSyncs("full", told.syncs.full, told.syncs.bounds);
  tellTimes();
}

function tellSyncs(kind, told, bounds) {
  put($(`${kind}-told`), told.count ? `${count(told.count)}; half ≤ ${seconds(told.p50)}, 99% ≤ ${seconds(told.p99)}` : "none yet");
  const bins = $(`${kind}-bins`);
  if (!bins.children.length) {
    bins.append(...told.counts.map(() => make("i")));
    for (const [place, text] of [["", "1 ms"], ["middle", seconds(bounds[7])], ["", "> 16 s"]]) {
      bins.append(make("span", place, text));
    }
  }
  const most = Math.max(1, ...told.counts);
  told.counts.forEach((n, i) => {
    const bin = bins.children[i];
    bin.style.height = `${n ? Math.max(4, (100 * n) / most) : 3}%`;
    bin.dataset.some = n ? "yes" : "no";
    bin.title = `${i < bounds.length ? `≤ ${seconds(bounds[i])}` : `> ${seconds(bounds[bounds.length - 1])}`}: ${count(n)}`;
  });
}

function tellTimes() {
  if (!last || last.trouble) return;
  const now = Date.now() / 1000;
  put($("agent"), `agent ${last.pid}, up ${span(now - last.startedAt)}, last sync ${span(now - last.lastSyncAt)} ago`);
}

function health(is, text) {
  $("health").dataset.is = is;
  put($("health"), text);
}

// ----------------------------------------------------------------------------------------------------------- services

function buildService(item) {
  const button = make(
    "button", "",
    make("span", "name"),
    make("span", "vip"),
    make("span", "figure of-rate", make("span", "num"), make("small", "", "per second")),
    make("span", "figure of-hits", make("span", "num"), make("small", "", "hits")),
  );
  button.type = "button";
  button.addEventListener("click", () => choose(item.id));
  return make("article", "service", button, make("div", "reals"), make("p", "none"));
}

function fillService(node, item) {
  const [button, reals, none] = node.children;
  const [name, vip, perSecond, hits] = button.children;
  node.dataset.chosen = item.id === wanted.chosen ? "yes" : "no";
  button.setAttribute("aria-pressed", String(item.id === wanted.chosen));
  put(name, item.name || "(no name)");
  put(vip, `${item.id} · ${item.kind}${item.draining ? ` · ${item.draining} draining` : ""}`);
  put(perSecond.firstChild, rate(item.rate));
  put(hits.firstChild, count(item.hits));
  keep(reals, item.backends, buildReal, fillReal);
  const text = item.backends.length ? (item.more ? `and ${plural(item.more, "more backend")}` : "") : `no endpoints: ${item.noEndpoints}`;
  none.hidden = !text;
  put(none, text);
}

function buildReal() {
  return make("div", "real", make("span", "at"), make("div", "share", make("i")), make("span", "n"), make("span", "n"), make("span", "n"));
}

function fillReal(node, real) {
  const [at, share, part, perSecond, hits] = node.children;
  node.dataset.state = real.state;
  put(at, real.state === "active" ? real.id : `${real.id} · ${state(real)}`);
  width(share.firstChild, real.share);
  put(part, percent(real.share));
  put(perSecond, `${rate(real.rate)}/s`);
  put(hits, count(real.hits));
}

function tellServices(told) {
  keep($("rows"), told.rows, buildService, fillService);
  const shown = told.rows.length;
  const which = told.found === told.all ? plural(told.all, "Service port") : `${count(told.found)} of ${plural(told.all, "Service port")}`;
  put($("found"), shown < told.found ? `first ${count(shown)} of ${which}` : which);
  $("further").hidden = shown >= Math.min(told.found, told.most);
  if (!wanted.chosen && told.rows.length) choose(told.rows[0].id, false);
}

// -------------------------------------------------------------------------------------------------------- one of them

let chart = null;
let names = [];
let columns = [];

function colour(name) {
  const index = names.indexOf(name);
  return index < 0 ? COLOURS[COLOURS.length - 1] : COLOURS[index % (COLOURS.length - 1)];
}

function tellChosen(told) {
  $("one-table").hidden = !told;
  if (!told) {
    put($("one-name"), "This Service has gone");
    put($("one-what"), wanted.chosen);
    put($("one-more"), "");
    return;
  }
  put($("one-name"), told.name || told.id);
  put($("one-what"), `${told.id} · ${told.kind} · ${told.scheduler} · ${count(told.hits)} hits · ${rate(told.rate)} per second`);
  keep($("one-rows"), told.backends, buildOneReal, fillOneReal);
  put($("one-more"), told.more ? `and ${plural(told.more, "more backend")}` : told.backends.length ? "" : `No endpoints: clients get ${told.noEndpoints}.`);
}

function buildOneReal() {
  const bar = make("div", "", make("div", "share", make("i")), make("span"));
  return make("tr", "", make("td", "", make("div", "of-one", make("i", "dot"), make("span"))), make("td"), make("td", "wide", bar), make("td"), make("td", "", make("span", "tag")));
}

function fillOneReal(row, real) {
  const [at, hits, share, perSecond, what] = row.children;
  at.firstChild.firstChild.style.background = colour(real.id);
  put(at.firstChild.lastChild, real.id);
  put(hits, count(real.hits));
  width(share.firstChild.firstChild.firstChild, real.share);
  put(share.firstChild.lastChild, percent(real.share));
  put(perSecond, rate(real.rate));
  what.firstChild.dataset.state = real.state;
  put(what.firstChild, state(real));
}

function tellPoints(told) {
  if (told.anew || !chart) {
    names = told.names;
    columns = [[], ...names.map(() => []), []];
  }
  for (const point of told.points) point.forEach((value, i) => columns[i].push(value));
  const from = columns[0][columns[0].length - 1] - SECONDS;
  while (columns[0].length > 2 && columns[0][0] < from) columns.forEach((column) => column.shift());
  if (told.anew || !chart) drawChart();
  else chart.setData(columns);
}

function drawChart() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--soft").trim();
  const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
  const lines = names.map((name) => ({ label: name, stroke: colour(name), width: 2, points: { show: false } }));
  const others = { label: OTHERS, stroke: COLOURS[COLOURS.length - 1], width: 1.5, dash: [4, 3], points: { show: false } };
  others.show = columns[columns.length - 1].some((value) => value > 0);
  if (chart) chart.destroy();
  chart = new uPlot(
    {
      width: $("one").clientWidth - 32,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false },
      scales: { x: { time: true, range: (_, low, high) => [Math.min(low, high - 60), high] }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.1)] } },
      axes: [
        { stroke: ink, grid: { show: false }, ticks: grid, values: (_, ticks) => ticks.map((t) => new Date(1000 * t).toLocaleTimeString("en-GB")), space: 90, size: 34 },
        { stroke: ink, grid, ticks: grid, size: 46, values: (_, ticks) => ticks.map((n) => short.format(n)) },
      ],
      series: [{}, ...lines, others],
      hooks: { setCursor: [showAt] },
    },
    columns,
    $("chart"),
  );
}

// Under the pointer the table shows the rates of that moment.
function showAt(plot) {
  const at = plot.cursor.idx;
  const rows = [...$("one-rows").children];
  for (const row of rows) {
    const line = names.indexOf(row.dataset.id) + 1;
    if (at !== null && at !== undefined && line) put(row.children[3], rate(columns[line][at]));
  }
}

function choose(id, scroll = true) {
  if (id === wanted.chosen) return;
  wanted.chosen = id;
  if (chart) chart.destroy();
  chart = null;
  names = [];
  for (const node of $("rows").children) node.dataset.chosen = node.dataset.id === id ? "yes" : "no";
  connect();
  if (scroll && $("one").getBoundingClientRect().top < 0) $("one").scrollIntoView({ behavior: "smooth" });
}

// --------------------------------------------------------------------------------------------------------- the stream

const TOLD = { overview: tellOverview, services: tellServices, chosen: tellChosen, points: tellPoints };

function connect() {
  if (source) source.close();
  source = null;
  const query = new URLSearchParams({ q: wanted.text, sort: wanted.sort, limit: wanted.limit, open: wanted.chosen });
  const kept = new URLSearchParams([["q", wanted.text], ["sort", wanted.sort], ["open", wanted.chosen]].filter(([key, value]) => value && value !== "name" && key));
  history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname);
  if (document.hidden) return;
  const mine = (source = new EventSource(`/events?${query}`));
  for (const [kind, tell] of Object.entries(TOLD)) {
    mine.addEventListener(kind, (event) => {
      if (mine === source) tell(JSON.parse(event.data));
    });
  }
  mine.onerror = () => {
    if (mine !== source) return;
    health("bad", "no connection");
    if (mine.readyState === EventSource.CLOSED) setTimeout(() => mine === source && connect(), 5000); // refused: too many viewers
  };
}

let typing = 0;
$("filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    wanted.text = $("filter").value;
    wanted.limit = 25;
    connect();
  }, 200);
});
$("sort").addEventListener("change", () => {
  wanted.sort = $("sort").value;
  connect();
});
$("further").addEventListener("click", () => {
  wanted.limit += 50;
  connect();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && source) {
    source.close();
    source = null;
  } else if (!document.hidden && !source) {
    if (chart) chart.destroy();
    chart = null;
    connect();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("filter")) {
    event.preventDefault();
    $("filter").focus();
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart && drawChart());
new ResizeObserver(() => chart && chart.setSize({ width: $("one").clientWidth - 32, height: HEIGHT })).observe($("one"));
setInterval(() => {
  tellTimes();
  if (source && heard && Date.now() - heard > 40000) health("bad", "no news");
}, 1000);

const before = new URLSearchParams(location.hash.slice(1));
wanted.text = $("filter").value = before.get("q") || "";
wanted.chosen = before.get("open") || "";
if (["rate", "hits"].includes(before.get("sort"))) wanted.sort = $("sort").value = before.get("sort");
connect();
