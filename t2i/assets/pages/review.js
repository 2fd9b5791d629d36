// Prompts as rows, models as columns. All text comes from the JSON in the page and is set as text.
const review = JSON.parse(document.getElementById("review").textContent);
const { prompts, columns } = review;
const counted = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const stages = Math.max(1, ...columns.flatMap((c) => Object.values(c.images).map((i) => i.changed.length + 1)));
const view = { stage: stages, map: false };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// -- what is kept in this browser: notes and votes -----------------------------------------------
const key = `review-${review.id}`;
const kept = { notes: {}, votes: [] };
try {
  Object.assign(kept, JSON.parse(localStorage.getItem(key) ?? "{}"));
} catch {} // a browser may forbid it for local files: then they last as long as the page
function keep() {
  try {
    localStorage.setItem(key, JSON.stringify(kept));
  } catch {}
}

function save() {
  const text = JSON.stringify({ review: review.id, title: review.title, columns: columns.map((c) => c.name), ...kept }, null, 2);
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: `${key}.json` });
  link.click();
}

async function load(file) {
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    return say(`${file.name} is not JSON`);
  }
  if (found?.review !== review.id || !Array.isArray(found.votes)) {
    return say(`${file.name} belongs to another review: its notes and votes are not of these images`);
  }
  // Two votes on a pair, or a vote on none, would count and could not be seen or taken back.
  const open = new Set(pairs.map(keyOf));
  const fits = (v) => v?.choice in CHOICES && open.delete(JSON.stringify([v.prompt, v.sample, v.models]));
  if (!found.votes.every(fits) || (found.notes ?? {}).constructor !== Object) {
    return say(`${file.name} is damaged: load a file as it was saved`);
  }
  kept.notes = found.notes ?? {};
  kept.votes = found.votes;
  keep();
  for (const area of document.querySelectorAll("textarea")) area.value = kept.notes[area.dataset.prompt] ?? "";
  say(`${kept.votes.length} votes and ${Object.keys(kept.notes).length} notes loaded`);
}

const message = make("p", { className: "faint", id: "message" });
const say = (text) => (message.textContent = text);

// -- pictures --------------------------------------------------------------------------------------
const number = (i) => String(i).padStart(5, "0");
const file = (prompt, sample) => `${prompt.folder}/samples/${number(sample)}.png`;

function pictureOf(shown) {
  const { column, prompt, sample } = shown;
  const image = column.images[file(prompt, sample)];
  const last = image.changed.length + 1;
  const stage = Math.min(view.stage, last);
  const name = stage === last ? file(prompt, sample) : `${prompt.folder}/stages/${number(sample)}_${stage}.png`;
  const place = column.place.split("/").map(encodeURIComponent).join("/"); // a folder's name may hold # or ?
  return { source: `${place}/${name}`, changed: stage > 1 ? image.changed[stage - 2] : null };
}

// A picture that follows the stage and the map; `shown` is {column, prompt, sample}.
function picture(shown) {
  const image = make("img", { loading: "lazy", alt: shown.prompt.text });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 160));
  const figure = make("figure", { shown }, image);
  draw(figure);
  return figure;
}

function draw(figure) {
  const { source, changed } = pictureOf(figure.shown);
  const image = figure.querySelector("img");
  if (image.getAttribute("src") !== source) image.src = source;
  figure.querySelector("canvas")?.remove();
  if (!view.map || changed === null) return;
  const [height, width] = figure.shown.column.grid;
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  for (let i = 0; i < width * height; i++) {
    const on = (parseInt(changed[i >> 2], 16) >> (3 - (i & 3))) & 1;
    context.fillStyle = on ? "rgb(255 60 0 / 0.55)" : "rgb(0 0 0 / 0.35)";
    context.fillRect(i % width, Math.floor(i / width), 1, 1);
  }
  figure.append(canvas);
}

const redraw = () => document.querySelectorAll("figure").forEach(draw);

function setStage(stage) {
  view.stage = Math.max(1, Math.min(stages, stage));
  for (const slider of document.querySelectorAll(".stage")) slider.value = view.stage;
  for (const label of document.querySelectorAll(".stage-name")) {
    label.textContent = view.stage === stages ? "final" : `draft ${view.stage}`;
  }
  redraw();
}

let playing = null;
function play() {
  if (playing) return (playing = clearInterval(playing));
  setStage(1);
  playing = setInterval(() => {
    if (view.stage === stages) playing = clearInterval(playing);
    else setStage(view.stage + 1);
  }, 700);
}

function setMap(on) {
  view.map = on;
  for (const box of document.querySelectorAll(".map")) box.checked = on;
  redraw();
}

function stageTools() {
  if (stages === 1) return [];
  const slider = make("input", { type: "range", className: "stage", min: 1, max: stages, value: view.stage, ariaLabel: "refinement stage" });
  slider.addEventListener("input", () => setStage(Number(slider.value)));
  const name = make("span", { className: "stage-name", textContent: "final" });
  const button = make("button", { type: "button", textContent: "Play", title: "play the stages (space)" });
  button.addEventListener("click", play);
  const box = make("input", { type: "checkbox", className: "map", checked: view.map });
  box.addEventListener("change", () => setMap(box.checked));
  return [make("label", {}, "Stage", slider, name), button, make("label", { title: "codes that this stage changed (m)" }, box, "changes")];
}

function mark(verdict) {
  if (!verdict) return "";
  const kind = verdict.share === 1 ? "mark" : verdict.share === 0 ? "mark no" : "mark part";
  const text = verdict.share === 1 ? "yes" : verdict.share === 0 ? "no" : `${Math.round(100 * verdict.share)} %`;
  return make("span", { className: kind, textContent: text, title: verdict.why.join("\n") });
}

const samples = Math.max(...columns.flatMap((c) => Object.keys(c.images).map((name) => Number(name.slice(-9, -4)) + 1)));
const has = (column, prompt, sample) => file(prompt, sample) in column.images;
const samplesOf = (column, prompt) => [...Array(samples).keys()].filter((s) => has(column, prompt, s));

// -- the table -------------------------------------------------------------------------------------
const table = make("div", { className: "columns" });
table.style.setProperty("--columns", columns.length);

function share(column, prompt) {
  const verdicts = samplesOf(column, prompt).map((s) => column.images[file(prompt, s)].verdict).filter(Boolean);
  return verdicts.length ? verdicts.reduce((sum, v) => sum + v.share, 0) / verdicts.length : null;
}

function row(prompt) {
  const note = make("textarea", { placeholder: "note", ariaLabel: `note on ${prompt.text}`, value: kept.notes[prompt.folder] ?? "" });
  note.dataset.prompt = prompt.folder;
  note.addEventListener("input", () => {
    if (note.value) kept.notes[prompt.folder] = note.value;
    else delete kept.notes[prompt.folder];
    keep();
  });
  const first = make("div", { className: "row prompt" }, make("h2", { textContent: prompt.text }), make("small", { textContent: prompt.tag }), note);
  const cells = columns.map((column) => {
    const cell = make("div", { className: "row cell" }, make("small", { className: "name", textContent: column.name }));
    for (const sample of samplesOf(column, prompt)) {
      const figure = picture({ column, prompt, sample });
      figure.tabIndex = 0;
      figure.append(mark(column.images[file(prompt, sample)].verdict));
      figure.addEventListener("click", () => zoom(figure.shown));
      figure.addEventListener("keydown", (event) => event.key === "Enter" && zoom(figure.shown));
      cell.append(figure);
    }
    return cell;
  });
  return [first, ...cells];
}

const rows = prompts.map((prompt) => ({ prompt, shares: columns.map((c) => share(c, prompt)), elements: row(prompt) }));
const judged = rows.some((r) => r.shares.some((s) => s !== null));
const search = make("input", { id: "search", type: "search", placeholder: "prompt or note (/)", ariaLabel: "search" });
const tags = [...new Set(prompts.map((p) => p.tag).filter(Boolean))];
const tag = make("select", { id: "tag", ariaLabel: "kind of prompt" }, ...["all kinds", ...tags].map((t, i) => make("option", { value: i ? t : "", textContent: t })));
const verdict = make("select", { id: "verdict", ariaLabel: "verdicts" }, ...[["", "all verdicts"], ["wrong", "something is wrong"], ["differ", "models differ"]].map(([value, textContent]) => make("option", { value, textContent })));
const nothing = make("p", { className: "empty", textContent: "Nothing matches.", hidden: true });

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const { prompt, shares, elements } of rows) {
    const text = `${prompt.text} ${kept.notes[prompt.folder] ?? ""}`.toLowerCase();
    const known = shares.filter((s) => s !== null);
    const wanted =
      words.every((w) => text.includes(w)) &&
      (!tag.value || prompt.tag === tag.value) &&
      (verdict.value !== "wrong" || known.some((s) => s < 1)) &&
      (verdict.value !== "differ" || new Set(known).size > 1);
    for (const element of elements) element.hidden = !wanted;
    shown += wanted;
  }
  nothing.hidden = shown > 0;
}
for (const control of [search, tag, verdict]) control.addEventListener("input", filter);

// -- one picture large -----------------------------------------------------------------------------
const zoomed = make("dialog", { id: "zoom" });
function zoom(shown) {
  const { column, prompt, sample } = shown;
  const judgement = column.images[file(prompt, sample)].verdict;
  const figure = picture(shown);
  // Else the dialog would focus the slider, which takes the arrow keys.
  Object.assign(figure, { autofocus: true, tabIndex: -1 });
  figure.addEventListener("click", () => zoomed.close());
  zoomed.shown = shown;
  zoomed.replaceChildren(
    make("header", {}, make("h3", { textContent: prompt.text }), make("span", { textContent: `${column.name}, sample ${sample}` }), mark(judgement)),
    figure,
    make("div", { className: "tools" }, ...stageTools(), make("span", { className: "moves" }, ...moves())),
    make("ul", {}, ...(judgement?.why ?? []).map((textContent) => make("li", { textContent }))),
    make("p", { className: "faint", textContent: "left, right: models · up, down: samples and prompts · space: stages · m: changes" }),
  );
  setStage(view.stage);
  if (!zoomed.open) zoomed.showModal();
}

// What the arrow keys do, where there are none.
const MOVES = [["←", "the model before", -1, 0], ["→", "the next model", 1, 0], ["↑", "the picture before", 0, -1], ["↓", "the next picture", 0, 1]];
function moves() {
  const buttons = MOVES.map(([textContent, title, across, down]) => {
    const button = make("button", { type: "button", textContent, title, ariaLabel: title });
    button.addEventListener("click", () => move(across, down));
    return button;
  });
  const close = make("button", { type: "button", textContent: "Close", title: "Escape" });
  close.addEventListener("click", () => zoomed.close());
  return [...buttons, close];
}

function move(across, down) {
  const { column, prompt, sample } = zoomed.shown;
  if (across) {
    const next = columns[columns.indexOf(column) + across];
    if (next && has(next, prompt, sample)) zoom({ column: next, prompt, sample });
    return;
  }
  const all = rows.filter((r) => !r.elements[0].hidden).flatMap((r) => samplesOf(column, r.prompt).map((s) => [r.prompt, s]));
  const next = all[all.findIndex(([p, s]) => p === prompt && s === sample) + down];
  if (next) zoom({ column, prompt: next[0], sample: next[1] });
}

// -- blind votes -----------------------------------------------------------------------------------
const CHOICES = { left: "Left (1)", right: "Right (2)", both: "Both good (3)", neither: "Neither (4)" };
const voting = make("dialog", { id: "vote" });

// The order and the sides are shuffled, the same for everybody who opens this review.
function random() {
  let state = parseInt(review.id.slice(0, 8), 16) || 1;
  return () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0), state / 2 ** 32);
}

function allPairs() {
  const pairs = [];
  for (let a = 0; a < columns.length; a++) {
    for (let b = a + 1; b < columns.length; b++) {
      for (const prompt of prompts) {
        for (const sample of samplesOf(columns[a], prompt)) {
          if (has(columns[b], prompt, sample)) pairs.push({ models: [columns[a], columns[b]], prompt, sample });
        }
      }
    }
  }
  const next = random();
  for (let i = pairs.length - 1; i >= 0; i--) {
    const j = Math.floor(next() * (i + 1));
    [pairs[i], pairs[j]] = [pairs[j], pairs[i]];
  }
  for (const pair of pairs) if (next() < 0.5) pair.models.reverse();
  return pairs;
}

const pairs = allPairs();
const nameOf = (pair) => [pair.prompt.folder, pair.sample, pair.models.map((m) => m.name)];
const keyOf = (pair) => JSON.stringify(nameOf(pair));

function vote() {
  const voted = new Set(kept.votes.map((v) => JSON.stringify([v.prompt, v.sample, v.models])));
  const open = pairs.find((pair) => !voted.has(keyOf(pair)));
  const done = make("button", { type: "button", textContent: "Result" });
  done.addEventListener("click", result);
  const undo = make("button", { type: "button", textContent: "Undo (u)", disabled: !kept.votes.length });
  undo.addEventListener("click", takeBack);
  voting.open_ = open;
  if (!open) result();
  else {
    setStage(stages);
    setMap(false);
    const sides = open.models.map((column) => picture({ column, prompt: open.prompt, sample: open.sample }));
    const buttons = Object.entries(CHOICES).map(([choice, textContent]) => {
      const button = make("button", { type: "button", textContent });
      button.addEventListener("click", () => cast(choice));
      return button;
    });
    voting.replaceChildren(
      make("header", {}, make("h3", { textContent: open.prompt.text }), make("span", { className: "faint", textContent: `${kept.votes.length + 1} of ${pairs.length}` })),
      make("div", { className: "pair" }, ...sides),
      make("div", { className: "tools" }, ...buttons, undo, done),
    );
  }
  if (!voting.open) voting.showModal();
}

function cast(choice) {
  if (!voting.open_) return;
  const [prompt, sample, models] = nameOf(voting.open_);
  kept.votes.push({ prompt, sample, models, choice });
  keep();
  vote();
}

function takeBack() {
  kept.votes.pop();
  keep();
  vote();
}

// Wins of each pair of models; a picture that is preferred counts 1, no preference 1/2.
function result() {
  voting.open_ = null;
  const lines = [];
  for (let a = 0; a < columns.length; a++) {
    for (let b = a + 1; b < columns.length; b++) {
      const names = [columns[a].name, columns[b].name];
      const votes = kept.votes.filter((v) => names.every((n) => v.models.includes(n)));
      const wins = names.map((n) => votes.filter((v) => v.models[v.choice === "left" ? 0 : v.choice === "right" ? 1 : 9] === n).length);
      const share = (wins[0] + (votes.length - wins[0] - wins[1]) / 2) / votes.length;
      const points = votes.length ? (wins[0] * (1 - share) ** 2 + wins[1] * share ** 2 + (votes.length - wins[0] - wins[1]) * (0.5 - share) ** 2) / votes.length : 0;
      const error = Math.sqrt(points / Math.max(votes.length - 1, 1));
      const rate = votes.length > 1 ? `${(100 * share).toFixed(0)} ± ${(100 * error).toFixed(0)} %` : "-";
      lines.push([names[0], names[1], wins[0], wins[1], votes.length - wins[0] - wins[1], rate]);
    }
  }
  const back = make("button", { type: "button", textContent: "Go on", hidden: kept.votes.length === pairs.length });
  back.addEventListener("click", vote);
  const close = make("button", { type: "button", textContent: "Close" });
  close.addEventListener("click", () => voting.close());
  const head = ["A", "B", "A preferred", "B preferred", "no preference", "share of A"];
  voting.replaceChildren(
    make("header", {}, make("h3", { textContent: `${kept.votes.length} of ${pairs.length} votes` })),
    make("table", {}, make("tr", {}, ...head.map((textContent) => make("th", { textContent }))), ...lines.map((line) => make("tr", {}, ...line.map((textContent) => make("td", { textContent }))))),
    make("p", { className: "faint", textContent: "± is the standard error over votes; votes on samples of one prompt are not independent." }),
    make("div", { className: "tools" }, back, close),
  );
}

// -- the page --------------------------------------------------------------------------------------
const upload = make("input", { type: "file", accept: ".json", id: "load", hidden: true });
upload.addEventListener("change", () => upload.files[0] && load(upload.files[0]).then(() => (upload.value = "")));
const button = (textContent, action, id) => {
  const element = make("button", { type: "button", textContent, id });
  element.addEventListener("click", action);
  return element;
};
const actions = [
  ...(pairs.length ? [button("Vote blind", vote, "vote-blind")] : []),
  button("Save notes and votes", save, "save"),
  button("Load", () => upload.click(), "load-button"),
];
const heads = columns.map((c) => make("div", { className: "head" }, make("b", { textContent: c.name }), make("small", { textContent: c.about }), make("small", { textContent: c.judge })));
table.append(make("div", { className: "head" }), ...heads, ...rows.flatMap((r) => r.elements));
document.body.append(
  make("header", {}, make("h1", { textContent: review.title }), make("p", { className: "faint", textContent: `${counted(prompts.length, "prompt")}, ${counted(columns.length, "model")}, up to ${counted(samples, "image")} each` }), message),
  make("nav", {}, make("div", { className: "tools" }, search, ...(tags.length ? [tag] : []), ...(judged ? [verdict] : []), ...stageTools()), make("div", { className: "tools" }, ...actions, upload)),
  nothing,
  table,
  zoomed,
  voting,
);
addEventListener("keydown", (event) => {
  if (event.target.matches("textarea, input[type=search]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const choice = Object.keys(CHOICES)[Number(event.key) - 1];
  if (event.key === "/" && !zoomed.open && !voting.open) search.focus();
  else if (event.key === "m") setMap(!view.map);
  else if (event.key === " " && !event.target.matches("button")) play();
  else if (zoomed.open && event.key in moves && !event.target.matches("input")) move(...moves[event.key]);
  else if (voting.open && choice) cast(choice);
  else if (voting.open && event.key === "u" && kept.votes.length) takeBack();
  else return;
  event.preventDefault();
});
