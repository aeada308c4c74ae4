"use strict";
(() => {
  const COLORS = ["#3b7dd8", "#e07b39", "#2f9e6e", "#b657c4", "#c49a1a", "#d64550", "#3fa7b8", "#8a6fdf", "#7d8a3a", "#c76b98"];
  const BLINK_MS = 600;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  for (const element of all(".tools, .scripted")) element.hidden = false;

  // Charts, in the colours of the reader's scheme.
  const charts = JSON.parse(byId("report-data").textContent).charts;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const draw = () => {
    const [ink, quiet, line] = ["--ink", "--quiet", "--line"].map(style);
    const text = { labelColor: quiet, titleColor: ink, titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12 };
    const config = {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
      legend: { labelColor: ink, labelFontSize: 12, labelLimit: 320, orient: "bottom", columns: innerWidth < 640 ? 1 : 4, symbolType: "stroke", symbolLimit: 0 },
    };
    for (const { id, spec } of charts) {
      const themed = structuredClone(spec);
      themed.config = config;
      const { bases } = spec.usermeta, { scale } = themed.encoding.color;
      const trained = scale.domain.filter((group) => !bases.includes(group));
      scale.range = scale.domain.map((group) => (bases.includes(group) ? quiet : COLORS[trained.indexOf(group) % COLORS.length]));
      byId(id).hidden = false;
      vegaEmbed(byId(id), themed, { ast: true, actions: false, renderer: "svg" }).catch((fault) => console.error(fault));
    }
  };
  if (charts.length) {
    draw();
    dark.addEventListener("change", draw);
  }

  // The filter and the guidance scale decide which rows are shown.
  const rows = all(".row"), filter = byId("filter"), scale = byId("scale");
  const showRows = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.querySelector("h3").textContent.toLowerCase();
      const other = scale && scale.value && row.dataset.scale && row.dataset.scale !== scale.value;
      row.hidden = other || !words.every((word) => text.includes(word));
    }
    byId("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  if (filter) {
    filter.addEventListener("input", showRows);
    scale?.addEventListener("change", showRows);
    showRows();
  }

  // One step for all runs: each shows its last image up to it, or else its first.
  const slider = byId("step");
  const showStep = () => {
    const step = Number(slider.dataset.steps.split(" ")[slider.value]);
    for (const track of all(".track")) {
      const figures = [...track.children];
      const shown = figures.findLast((figure) => Number(figure.dataset.step) <= step) ?? figures[0];
      for (const figure of figures) figure.hidden = figure !== shown;
    }
    slider.setAttribute("aria-valuetext", `step ${step}`);
    byId("step-shown").textContent = `step ${step}`;
  };
  if (slider) {
    slider.addEventListener("input", showStep);
    showStep();
  }

  // Any two images, one over the other.
  const viewer = byId("viewer"), blink = byId("blink"), wipe = byId("wipe");
  let picked = [], timer = null;
  const setBlink = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => viewer.classList.toggle("off"), BLINK_MS) : null;
    viewer.classList.remove("off");
    viewer.classList.toggle("blinking", on);
    blink.setAttribute("aria-pressed", String(on));
    wipe.disabled = on;
  };
  const showPicked = () => {
    for (const button of all(".pick")) {
      const place = picked.indexOf(button);
      button.setAttribute("aria-pressed", String(place >= 0));
      if (place >= 0) button.dataset.pick = "AB"[place];
      else delete button.dataset.pick;
    }
    viewer.hidden = picked.length < 2;
    if (viewer.hidden) return setBlink(false);
    picked.forEach((button, place) => {
      const source = button.querySelector("svg"), target = byId(["under", "over"][place]);
      target.setAttribute("viewBox", source.getAttribute("viewBox"));
      target.setAttribute("aria-label", source.getAttribute("aria-label"));
      target.setAttribute("class", source.getAttribute("class"));
      target.firstElementChild.setAttribute("href", source.firstElementChild.getAttribute("href"));
      const caption = button.closest("figure").querySelector("figcaption").textContent;
      byId(["name-a", "name-b"][place]).textContent = `${"AB"[place]}: ${caption}`;
    });
    (wipe.disabled ? blink : wipe).focus({ preventScroll: true }); // closing goes back to the image
  };
  for (const svg of all("#images figure > .pic")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "pick";
    button.title = "Compare";
    button.setAttribute("aria-pressed", "false");
    svg.replaceWith(button);
    button.append(svg);
    button.addEventListener("click", () => {
      picked = picked.includes(button) ? picked.filter((other) => other !== button) : [...picked.slice(-1), button];
      showPicked();
    });
  }
  const close = () => {
    const last = picked.at(-1);
    picked = [];
    showPicked();
    last?.focus();
  };
  wipe.addEventListener("input", () => viewer.style.setProperty("--wipe", `${wipe.value}%`));
  blink.addEventListener("click", () => setBlink(timer === null));
  byId("close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !viewer.hidden) close();
  });
})();
