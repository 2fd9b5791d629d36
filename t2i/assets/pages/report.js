// Charts that tell their numbers, and pictures with a slider. All text is set as text.
const SVG = "http://www.w3.org/2000/svg";

for (const figure of document.querySelectorAll(".chart")) {
  const { x, across, down, label, series } = JSON.parse(figure.dataset.reading);
  const places = [...new Set(series.flatMap((s) => s.points.map(([at]) => at)))].sort((a, b) => a - b);
  const svg = figure.querySelector("svg");
  const { width } = svg.viewBox.baseVal;
  const cursor = document.createElementNS(SVG, "line");
  cursor.setAttribute("class", "cursor");
  let current = places.length;

  const show = (index) => {
    current = Math.max(0, Math.min(places.length - 1, index));
    const at = places[current];
    const found = series.flatMap((s) => s.points.filter(([px]) => px === at).map(([, y]) => `${s.name} ${Number(y.toPrecision(4))}`));
    figure.querySelector("output").textContent = `${label} ${Number(at.toPrecision(6))}: ${found.join(" · ")}`;
    const place = width * (across[0] + ((across[1] - across[0]) * (at - x[0])) / (x[1] - x[0]));
    for (const [name, value] of Object.entries({ x1: place, x2: place, y1: down[0], y2: down[1] })) cursor.setAttribute(name, value);
    svg.append(cursor);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - across[0]) / (across[1] - across[0]);
    const at = x[0] + share * (x[1] - x[0]);
    show(places.reduce((best, place, i) => (Math.abs(place - at) < Math.abs(places[best] - at) ? i : best), 0));
  });
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    show(current + by);
    event.preventDefault();
    event.stopPropagation();
  });
}

// Pictures over time, or over stages; left, right and space move the first of them from anywhere.
const films = [...document.querySelectorAll(".frames")].map((figure) => {
  const frames = JSON.parse(figure.dataset.frames);
  const [slider, image, label, button] = ["input", "img", "output", "button"].map((tag) => figure.querySelector(tag));
  let playing = null;
  const show = (index) => {
    slider.value = Math.max(0, Math.min(frames.length - 1, index));
    [image.src, label.textContent] = frames[slider.value];
    image.alt = label.textContent;
  };
  const stop = () => (playing = clearInterval(playing));
  const play = () => {
    if (playing) return stop();
    show(0);
    playing = setInterval(() => (Number(slider.value) === frames.length - 1 ? stop() : show(Number(slider.value) + 1)), 700);
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  button.addEventListener("click", play);
  return { move: (by) => show(Number(slider.value) + by), play };
});
if (films.length) {
  addEventListener("keydown", (event) => {
    if (event.target.matches("input, button, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") films[0].move(-1);
    else if (event.key === "ArrowRight") films[0].move(1);
    else if (event.key === " ") films[0].play();
    else return;
    event.preventDefault();
  });
}
