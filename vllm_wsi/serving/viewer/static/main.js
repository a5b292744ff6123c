// The page: chooses a slide, shows it with its selection, and hands it to the chat.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { Overlay } from "./overlay.js";
import { createStage, drawScale, keepWhole, openSlide } from "./stage.js";

const at = (id) => document.getElementById(id);
const viewer = createStage(at("slide"));
const overlay = new Overlay(viewer, choosePatch);
const chat = new Chat(showPatchesFor);
const state = { slides: [], url: null, facts: null, patches: [], loading: new AbortController(), heatUrl: null };
state.asking = new AbortController(); // for the patches of the last question
const accepted = new Set(); // URLs of slides whose guessed places the user wants to see all the same

function showProblem(error) {
  if (error?.name === "AbortError") return;
  at("problem").textContent = error ? error.message : "";
  at("problem").hidden = !error;
  if (error?.status === 401) {
    at("key-box").open = true;
    at("key").focus();
  }
}

// --- slides

async function loadSlides() {
  showProblem(null);
  try {
    const [listed, models] = await Promise.all([api.json("wsi/slides"), api.json("models")]);
    state.slides = listed.slides;
    at("slide-note").textContent = listed.truncated ? "There are more slides than are listed here." : "";
    chat.setModel(models.data[0]?.id);
    listSlides();
    openFromHash();
  } catch (error) {
    showProblem(error);
  }
}

function listSlides() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = state.slides.filter(({ name }) => words.every((word) => name.toLowerCase().includes(word)));
  const shown = found.slice(0, 500);
  at("slide-list").replaceChildren(
    ...shown.map((slide) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = hashOf(slide.url);
      const cut = slide.name.lastIndexOf("/") + 1;
      const folder = document.createElement("small");
      folder.textContent = slide.name.slice(0, cut);
      link.append(folder, slide.name.slice(cut));
      link.title = slide.has_image ? slide.name : `${slide.name} (no slide image beside it)`;
      link.classList.toggle("without-image", !slide.has_image);
      if (slide.url === state.url) link.setAttribute("aria-current", "true");
      item.append(link);
      return item;
    }),
  );
  const count = state.slides.length;
  at("slide-count").textContent = found.length === count ? `${count}` : `${found.length} of ${count}`;
  if (shown.length < found.length) at("slide-count").textContent += `, the first ${shown.length} shown`;
  if (!count) at("slide-note").textContent = "No feature files below the allowed path.";
}

const hashOf = (url) => `#slide=${encodeURIComponent(url)}`;

function openFromHash() {
  const url = new URLSearchParams(location.hash.slice(1)).get("slide");
  const first = state.slides.find((slide) => slide.has_image) ?? state.slides[0];
  if (url && url !== state.url) open(url);
  else if (!url && !state.url && first) location.replace(hashOf(first.url));
}

// --- one slide

async function open(url) {
  state.loading.abort();
  const { signal } = (state.loading = new AbortController());
  Object.assign(state, { url, facts: null, patches: [], question: "" });
  chat.start(url);
  overlay.clear();
  viewer.close();
  listSlides();
  listPatches();
  showProblem(null);
  setHeat(0);
  at("remark").hidden = at("geojson").hidden = at("accept").hidden = at("qc").hidden = true;
  at("kept-note").textContent = "";
  at("trust").hidden = true;
  at("title").textContent = "";
  at("empty").hidden = false;
  at("empty").textContent = "Opening …";
  try {
    const facts = await api.json("wsi/slide", { url }, signal);
    state.facts = facts;
    at("title").textContent = describe(facts);
    showRemarks(facts);
    at("qc").hidden = !facts.has_qc;
    at("patches").classList.toggle("with-pictures", facts.has_image); // takes their room before the view is laid out
    if (facts.extent_px) await openSlide(viewer, url, facts);
    if (signal.aborted) return;
    at("empty").textContent = "This file does not say where its patches lie.";
    at("empty").hidden = Boolean(facts.extent_px);
    at("kept-note").textContent = "scoring …";
    await Promise.all([showSelection(url, signal), showHeat(url, facts, signal)]);
    if (!signal.aborted) await loadPictures(url, signal);
  } catch (error) {
    if (signal.aborted) return;
    at("empty").textContent = at("empty").hidden ? "" : "This slide cannot be shown.";
    if (!state.patches.length) at("kept-note").textContent = "";
    showProblem(error);
  }
}

// The slide's URL as the question's patches are asked for, where the checkpoint's scorer hears it.
function asked() {
  const named = new URLSearchParams(state.url.split("#")[1] ?? "").has("q"); // then the chat hears that one, too
  if (!state.question || named || !state.facts?.hears_questions) return state.url;
  return `${state.url}${state.url.includes("#") ? "&" : "#"}q=${encodeURIComponent(state.question)}`;
}

async function showPatchesFor(question) {
  state.question = question;
  if (!state.facts?.hears_questions) return;
  state.asking.abort();
  state.asking = new AbortController();
  const signal = AbortSignal.any([state.loading.signal, state.asking.signal]);
  try {
    await Promise.all([showSelection(state.url, signal), showHeat(state.url, state.facts, signal)]);
    if (!signal.aborted) await loadPictures(state.url, signal);
  } catch (error) {
    if (!signal.aborted) showProblem(error);
  }
}

// Whether patches would be drawn upon the slide at places that nobody said.
const withheld = (facts, url) => facts.has_image && facts.guesses.length > 0 && !accepted.has(url);

function showRemarks(facts) {
  const remarks = [...facts.remarks];
  if (facts.guesses.length) remarks.push(`Guessed, as the feature file does not say it: ${facts.guesses.join(", ")}.`);
  at("remark").textContent = remarks.join(" ");
  at("remark").hidden = !remarks.length;
  at("accept").hidden = !withheld(facts, state.url);
}

function describe(facts) {
  const parts = [facts.name, `${facts.num_patches.toLocaleString("en")} patches`];
  if (facts.encoder) parts.push(facts.encoder);
  if (facts.mpp) parts.push(`${Number(facts.mpp.toPrecision(3))} µm/px`);
  return parts.join(" · ");
}

async function showSelection(url, signal) {
  const chosen = await (await api.post(api.address("wsi/select"), { url: asked() }, signal)).json();
  if (signal.aborted) return;
  const rects = withheld(state.facts, url) ? null : chosen.rects;
  const patches = chosen.indices.map((row, i) => ({ row, score: chosen.scores[i], rect: rects?.[i] }));
  patches.sort((a, b) => b.score - a.score || a.row - b.row);
  patches.forEach((patch, i) => (patch.rank = i + 1));
  state.patches = patches;
  listPatches(); // before the note says whose they are
  const nan = chosen.num_nonfinite ? `, ${chosen.num_nonfinite} without a finite score` : "";
  const why = asked() === url ? "" : ` for “${state.question}”`;
  const means = chosen.num_summary_tokens ? `, and ${chosen.num_summary_tokens} means of the others` : "";
  at("kept-note").textContent = `${patches.length} of ${chosen.num_patches.toLocaleString("en")}${means}${nan}${why}`;
  await keepWhole(viewer, () => showTrust(chosen));
  if (signal.aborted) return;
  if (chosen.rects_missing) {
    at("remark").textContent = chosen.rects_missing;
    at("remark").hidden = false;
  }
  at("geojson").hidden = !chosen.rects;
  if (state.facts.extent_px) overlay.show(patches);
}

// What the checkpoint's calibration says of the slide, in words; nothing where it has none.
function showTrust({ sufficiency, in_distribution, warnings }) {
  const usual = "The patches stand out enough for an answer, and the slide is like those the model was checked on";
  const numbers = `(sufficiency ${sufficiency?.toFixed(2)}, in distribution ${in_distribution?.toFixed(2)})`;
  at("trust").hidden = sufficiency === null;
  at("trust").textContent = warnings.length ? `${warnings.join(" ")} ${numbers}` : `${usual} ${numbers}.`;
  at("trust").classList.toggle("warning", warnings.length > 0);
}

async function showHeat(url, facts, signal) {
  if (!facts.extent_px || withheld(facts, url)) return;
  const query = { url: asked(), overlay: 1, accept_guess: Number(accepted.has(url)) };
  const picture = await (await api.ask(api.address("wsi/heatmap.png", query), { signal })).blob();
  if (signal.aborted) return;
  if (state.heatUrl) URL.revokeObjectURL(state.heatUrl);
  state.heatUrl = URL.createObjectURL(picture);
  overlay.setHeat(state.heatUrl, facts.extent_px);
  if (!facts.has_image) setHeat(100); // there is nothing else to see
}

function setHeat(percent) {
  at("heat").value = percent;
  at("heat-value").textContent = `${percent} %`;
  overlay.setOpacity(percent / 100);
}

// --- kept patches

function listPatches() {
  at("patches").replaceChildren(
    ...state.patches.map((patch, i) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = i === 0 ? 0 : -1;
      button.disabled = !patch.rect;
      button.setAttribute("aria-label", `Rank ${patch.rank}, score ${patch.score.toFixed(3)}, row ${patch.row}`);
      const rank = document.createElement("b");
      rank.textContent = patch.rank;
      const score = document.createElement("span");
      score.textContent = patch.score.toFixed(3);
      if (state.facts?.tiles && patch.rect) {
        patch.picture = document.createElement("i");
        button.append(patch.picture);
      }
      button.append(rank, score);
      button.addEventListener("click", () => choosePatch(patch));
      patch.button = button;
      item.append(button);
      return item;
    }),
  );
}

// Two at a time, after what is in view.
async function loadPictures(url, signal) {
  if (!state.facts.tiles) return;
  const waiting = state.patches.filter(({ picture }) => picture);
  const { version } = state.facts.tiles;
  const work = async () => {
    for (let patch; (patch = waiting.shift()); ) {
      const [x, y, width, height] = patch.rect;
      const query = { url, x, y, width, height, side: 132, version };
      const blob = await (await api.ask(api.address("wsi/region", query), { signal })).blob();
      const picture = document.createElement("img");
      picture.alt = "";
      picture.src = URL.createObjectURL(blob);
      picture.addEventListener("load", () => URL.revokeObjectURL(picture.src), { once: true });
      patch.picture.replaceWith(picture);
    }
  };
  await Promise.all([work(), work()]);
}

function choosePatch(patch) {
  for (const other of state.patches) {
    other.button.setAttribute("aria-pressed", other === patch);
    other.button.tabIndex = other === patch ? 0 : -1;
  }
  patch.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (!patch.rect) return;
  overlay.mark(patch);
  overlay.zoomTo(patch);
}

at("patches").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const index = state.patches.findIndex(({ button }) => button === document.activeElement);
  if (!step || index < 0) return;
  event.preventDefault();
  const next = state.patches[(index + step + state.patches.length) % state.patches.length];
  state.patches[index].button.tabIndex = -1;
  next.button.tabIndex = 0;
  next.button.focus();
});

// --- controls

at("filter").addEventListener("input", listSlides);
at("heat").addEventListener("input", () => setHeat(Number(at("heat").value)));
at("outlines").addEventListener("change", () => overlay.setOutlines(at("outlines").checked));
at("zoom-in").addEventListener("click", () => viewer.viewport.zoomBy(1.6));
at("zoom-out").addEventListener("click", () => viewer.viewport.zoomBy(1 / 1.6));
at("home").addEventListener("click", () => viewer.viewport.goHome());
at("geojson").addEventListener("click", async (event) => {
  event.preventDefault();
  try {
    const answer = await api.post(api.address("wsi/select", { format: "geojson" }), { url: asked() });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${state.facts.name}.geojson`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } catch (error) {
    showProblem(error);
  }
});
at("accept").addEventListener("click", () => {
  accepted.add(state.url);
  open(state.url);
});
at("qc").addEventListener("click", async (event) => {
  event.preventDefault();
  try {
    const answer = await api.ask(api.address("wsi/qc.png", { url: state.url })); // a plain link would carry no key
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.target = "_blank";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    showProblem(error);
  }
});
at("key").value = api.key.get();
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(at("key").value.trim());
  at("key-box").open = false;
  state.url = null;
  loadSlides();
});
addEventListener("hashchange", openFromHash);
viewer.addHandler("update-viewport", () => drawScale(viewer, at("scale"), state.facts?.mpp));
viewer.addHandler("tile-load-failed", async (event) => {
  if (!state.facts?.has_image || state.url !== new URL(event.tile.getUrl()).searchParams.get("url")) return;
  await api.ask(event.tile.getUrl()).catch(showProblem); // for the server's sentence
});

loadSlides();
