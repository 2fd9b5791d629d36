// Filters (kept in the address, so that a view can be linked to) and a larger view of a card; keys:
// / search, b boxes, m masks, Enter a card, left and right the next one.
const all = (selector) => [...document.querySelectorAll(selector)];
const search = document.getElementById("search");
const zoom = document.getElementById("zoom");

function apply() {
  const state = new URLSearchParams(location.hash.slice(1));
  const task = state.get("task") ?? "";
  const words = (state.get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  if (document.activeElement !== search) search.value = state.get("q") ?? "";
  let shown = 0;
  for (const section of all("section")) {
    let here = 0;
    const cards = section.querySelectorAll("article");
    for (const card of cards) {
      const wanted = task === "" || JSON.parse(card.dataset.tasks).includes(task);
      card.hidden = !(wanted && words.every((word) => card.dataset.text.includes(word)));
      here += !card.hidden;
    }
    section.hidden = here === 0;
    section.querySelector(".shown").textContent = here < cards.length ? `, ${here} shown` : "";
    shown += here;
  }
  for (const chip of all(".chip")) {
    chip.classList.toggle("on", chip.dataset.task === task);
    chip.href = "#" + new URLSearchParams({ task: chip.dataset.task, q: words.join(" ") });
  }
  document.getElementById("nothing").hidden = shown > 0;
}

function show(card) {
  zoom.replaceChildren(card.cloneNode(true));
  zoom.current = card;
  if (!zoom.open) zoom.showModal();
}

function step(by) {
  const cards = all("section article:not([hidden])");
  const next = cards[cards.indexOf(zoom.current) + by];
  if (next) show(next);
}

if (search) {
  search.addEventListener("input", () => {
    const task = new URLSearchParams(location.hash.slice(1)).get("task") ?? "";
    history.replaceState(null, "", "#" + new URLSearchParams({ task, q: search.value }));
    apply();
  });
  for (const name of ["boxes", "masks"]) {
    const toggle = document.getElementById(name);
    if (!toggle) continue; // no card has any
    const update = () => document.body.classList.toggle("no-" + name, !toggle.checked);
    toggle.addEventListener("change", update);
    update(); // a browser may remember the box from before a reload
  }
  for (const card of all("section article")) {
    card.addEventListener("click", () => show(card));
    card.addEventListener("keydown", (event) => event.key === "Enter" && show(card));
  }
  zoom.addEventListener("click", () => zoom.close());
  zoom.addEventListener("close", () => zoom.current.focus());
  zoom.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  addEventListener("keydown", (event) => {
    if (event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
    const toggle = document.getElementById({ b: "boxes", m: "masks" }[event.key] ?? "");
    if (toggle) toggle.click();
    else if (event.key === "/" && !zoom.open) search.focus();
    else return;
    event.preventDefault();
  });
  addEventListener("hashchange", apply);
  apply();
}
