// The page of runs: the steps of a run, and one step's curves next to those of another run.

import { make, shown } from "./markdown.js";
import { readJson } from "./server.js";
import { readSettings } from "./store.js";
import { day, measured } from "./view.js";

const $ = (id) => document.getElementById(id);
const LOOK_MILLISECONDS = 3000;
const HEIGHT = 170;
const FEWEST_OF_A_LINE = 3;
// Shown first, in this order.
const FIRST = ["loss", "smooth_loss", "val_bpb", "val_loss", "reward", "pass_at_1", "val_pair_accuracy", "lr_multiplier", "tokens_per_second"];

const TRAINING = ["pretrain", "midtrain", "sft", "preference", "rl"];
const HIDDEN = /_stderr$|^elapsed_seconds$|^expected_iterations$/;

let [run, step, other] = decodeURIComponent(location.hash.slice(1)).split("|");
const charts = new Map(); // metric → chart
let span = [0, 1]; // first and last iteration of all charts

function runPath(...names) {
  return ["/api/runs", ...names.map(encodeURIComponent)].join("/");
}

function nameOf({ run: id, experiment, started }) {
  return `${experiment ?? id} · ${day(started)}`;
}

async function begin() {
  document.documentElement.dataset.theme = readSettings().theme;
  const { data } = await readJson("/api/runs");
  run = data.some((one) => one.run === run) ? run : data[0]?.run;
  const options = () => data.map((one) => make("option", { value: one.run }, nameOf(one)));
  $("run").replaceChildren(...options());
  $("other").replaceChildren(make("option", { value: "" }, "no other run"), ...options());
  $("run").value = run ?? "";
  $("other").value = data.some((one) => one.run === other) ? other : "";
  if (!run) throw new Error("There are no runs yet.");
}

/** Refresh the page, and again after a while if something runs. */
async function look() {
  clearTimeout(look.next);
  const turn = look.turn = (look.turn ?? 0) + 1;
  [run, other] = [$("run").value, $("other").value];
  let running = false;
  try {
    const found = await readJson(runPath(run));
    running = found.outcome === "unfinished";
    const going = found.steps.find((one) => one.state === "running");
    const trained = found.steps.filter((one) => one.state !== "missing" && TRAINING.includes(one.stage)).at(-1);
    if (!found.steps.some((one) => one.step === step)) step = (going ?? trained ?? found.steps[0]).step;
    history.replaceState(null, "", `#${encodeURIComponent([run, step, other].join("|"))}`);
    if (turn !== look.turn) return;
    showSteps(found.steps);
    const mine = await readJson(runPath(run, step));
    const theirs = other ? await readJson(runPath(other, step)).catch(() => null) : null;
    if (turn !== look.turn) return;
    showStep(mine, theirs);
    $("problem").hidden = true;
  } catch (error) {
    complain(error);
  }
  if (running) look.next = setTimeout(look, LOOK_MILLISECONDS);
}

function complain(error) {
  $("problem").textContent = error.status === 401 ? "This server needs an API key: give it on the chat page." : error.message;
  $("problem").hidden = false;
}

/** Show the steps in columns, each to the right of all its inputs. */
function showSteps(steps) {
  const levels = new Map();
  for (const { step: name, inputs } of steps) {
    levels.set(name, 1 + Math.max(-1, ...Object.values(inputs).map((input) => levels.get(input) ?? -1)));
  }
  const columns = [];
  for (const one of steps) (columns[levels.get(one.step)] ??= []).push(one);
  const focused = document.activeElement.dataset?.step;
  const { scrollLeft } = $("steps");
  $("steps").replaceChildren(...columns.map((column) => make("li", {}, column.map((one) => make("button", {
    class: `step ${one.state}`, "data-step": one.step, "aria-pressed": one.step === step, onclick: () => { step = one.step; look(); },
  }, make("strong", {}, one.step), make("span", {}, stateOf(one)))))));
  $("steps").scrollLeft = scrollLeft;
  if (showSteps.last !== step) document.querySelector(".step[aria-pressed=true]").scrollIntoView({ block: "nearest", inline: "center" });
  showSteps.last = step;
  if (focused) document.querySelector(`[data-step="${CSS.escape(focused)}"]`)?.focus();
}

function stateOf({ state, seconds, iteration, iterations }) {
  const planned = iterations === null ? "" : ` of ${iterations.toLocaleString()}`;
  if (state === "running") return iteration === null ? "runs" : `runs, iteration ${iteration.toLocaleString()}${planned}`;
  const took = seconds === null ? "" : seconds < 90 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
  return { run: took, cached: `${took}, kept`, missing: "not yet" }[state] ?? state;
}

function showStep(mine, theirs) {
  $("step").hidden = false;
  $("step-name").textContent = mine.step;
  $("step-state").textContent = [stateOf(mine), mine.artifact, mine.error,
    theirs && `dashed: ${$("other").selectedOptions[0].textContent}`].filter(Boolean).join(" · ");
  showCurves(mine.series, theirs?.series ?? {});
  const facts = Object.keys(mine.metrics).length ? [measured("Measured", mine.metrics)] : [];
  if (theirs && Object.keys(theirs.metrics).length) facts.push(measured("Measured in the other run", theirs.metrics));
  const made = Object.entries(mine.inputs).map(([role, name]) => [make("dt", {}, role),
    make("dd", {}, make("button", { onclick: () => { step = name; look(); } }, name))]);
  if (made.length) facts.push(make("h3", {}, "Made from"), make("dl", {}, made.flat()));
  $("facts").replaceChildren(...facts);
  $("samples").replaceChildren(...(mine.samples.length ? [make("h3", {}, "Samples")] : []), ...mine.samples.map(({ prompt, text }) => (
    make("blockquote", { dir: "auto" }, make("strong", {}, shown(prompt)), shown(text)))));
}

function showCurves(mine, theirs) {
  const place = (name) => (FIRST.indexOf(name) + 1 || FIRST.length + 1);
  const names = [...new Set([...Object.keys(mine), ...Object.keys(theirs)])].filter((name) => !HIDDEN.test(name))
    .sort((a, b) => place(a) - place(b));
  for (const [name, chart] of charts) {
    if (names.includes(name) && chart.step === step && chart.other === other) continue;
    chart.root.parentElement.remove();
    chart.destroy();
    charts.delete(name);
  }
  const all = [mine, theirs].flatMap((series) => Object.values(series).flatMap(([xs]) => [xs[0], xs.at(-1)]));
  span = [Math.min(...all), Math.max(...all, Math.min(...all) + 1)];
  for (const name of names) {
    const data = globalThis.uPlot.join([mine[name] ?? [[], []], theirs[name] ?? [[], []]]);
    if (charts.has(name)) charts.get(name).setData(data);
    else charts.set(name, Object.assign(draw(name, data), { step, other }));
  }
}

function rangeOf(low, high) {
  if (low === null) return [0, 1];
  const room = Math.abs(low) / 10 || 1; // around a single value
  return low === high ? [low - room, high + room] : globalThis.uPlot.rangeNum(low, high, 0.1, true);
}

function lineOfMany(u, series, first, last) {
  const count = u.data[series].filter((value) => value !== null && value !== undefined).length;
  return count < FEWEST_OF_A_LINE ? null : globalThis.uPlot.paths.linear()(u, series, first, last);
}

function draw(name, data) {
  const figure = make("figure", { class: "curve" }, make("figcaption", {}, name.replaceAll("_", " ")));
  $("curves").append(figure);
  const colour = (part) => { // the canvas needs colours resolved for light or dark
    figure.style.color = `var(--${part})`;
    return getComputedStyle(figure).color;
  };
  const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui", size: 28 };
  // Few values are points: a line between two of them would show what was not measured.
  const line = (label, part, dash) => (
    { label, stroke: colour(part), width: 2, dash, spanGaps: true, paths: lineOfMany, points: { show: (u) => u.data[0].length < 40, size: 6 } });
  const lines = [line("this run", "accent"), line("the other run", "soft", [5, 4])];
  figure.style.color = "";
  const compact = (tick) => Number(tick.toPrecision(6)).toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
  return new globalThis.uPlot({
    width: figure.clientWidth, height: HEIGHT, legend: { show: false }, cursor: { y: false },
    scales: { x: { time: false, range: () => span }, y: { range: (_, low, high) => rangeOf(low, high) } },
    axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) && tick >= 0 ? compact(tick) : "")) },
      { ...axis, size: (_, labels) => 16 + 7 * Math.max(3, ...(labels ?? []).map((label) => label.length)), values: (_, ticks) => ticks.map(compact) }],
    series: [{ label: "iteration" }, ...lines],
  }, data, figure);
}

new ResizeObserver(() => {
  for (const chart of charts.values()) chart.setSize({ width: chart.root.parentElement.clientWidth, height: HEIGHT });
}).observe($("curves"));
for (const id of ["run", "other"]) $(id).addEventListener("change", look);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
begin().then(look, complain);
