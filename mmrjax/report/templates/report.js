"use strict";
// What the page does beyond showing: sort tables, slide the threshold, filter and enlarge pictures.
// Without it, the page shows the same numbers at the threshold of the run.
document.documentElement.classList.add("js");

const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) : "–");
const onPress = (element, action) => {
  element.tabIndex = 0;
  element.addEventListener("click", action);
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action(); }
  });
};

// Sorting: within each method, its categories or domains; its name and its summary stay in place.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    onPress(head, () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const value = (row) => {
        const text = row.cells[column].textContent.trim();
        return Number.isNaN(parseFloat(text)) ? text : parseFloat(text);
      };
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => /\b(all|domain|category)\b/.test(row.className));
        const after = rows.length ? rows[rows.length - 1].nextSibling : null;
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
          return (x < y ? 1 : x > y ? -1 : 0) * (falling ? 1 : -1);
        };
        rows.sort(order).forEach((row) => body.insertBefore(row, after));
      }
    });
  });
}

// The threshold: counts per domain, and the outcome of every picture of the same run.
const outcome = (figure, threshold) => {
  const flagged = Number(figure.dataset.score) > threshold;
  if (figure.dataset.label === "good") return flagged ? "false alarm" : "passed";
  return flagged ? "found" : "missed";
};
const filters = new Map();
for (const panel of document.querySelectorAll(".threshold")) {
  const data = JSON.parse(panel.dataset.scores);
  const slider = panel.querySelector("input");
  const shown = panel.querySelector("output");
  const figures = [...document.querySelectorAll(`figure[data-run="${CSS.escape(panel.dataset.run)}"]`)];
  const bound = panel.querySelector(".bound");
  const update = (threshold) => {
    if (bound) bound.textContent = data.bounds[data.levels.findIndex((level) => level >= threshold)];
    shown.textContent = threshold.toPrecision(5);
    slider.setAttribute("aria-valuetext", shown.textContent);
    for (const row of panel.querySelectorAll("tbody tr")) {
      const own = data.domains[row.dataset.domain];
      const above = (scores) => scores.filter((score) => score > threshold).length;
      const [flagged, found] = [above(own.good), above(own.anomaly)];
      const cells = [own.good.length - flagged, flagged, found, own.anomaly.length - found,
        percent(flagged, own.good.length), percent(found, own.anomaly.length)];
      cells.forEach((cell, i) => { row.cells[i + 1].textContent = cell; });
    }
    figures.forEach((figure) => {
      figure.dataset.outcome = outcome(figure, threshold);
      figure.querySelector(".outcome").textContent = figure.dataset.outcome;
    });
    if (filters.has(panel.dataset.run)) filters.get(panel.dataset.run)();
  };
  slider.addEventListener("input", () => update(data.levels[Number(slider.value)]));
  panel.querySelector("button").addEventListener("click", () => {
    slider.value = data.levels.findIndex((level) => level >= data.threshold);
    update(data.threshold);
  });
}

// The gallery's filters.
for (const bar of document.querySelectorAll(".filters")) {
  const figures = [...document.querySelectorAll(`figure[data-run="${CSS.escape(bar.dataset.run)}"]`)];
  const choices = [...bar.querySelectorAll("select")];
  const apply = () => {
    let left = 0;
    figures.forEach((figure) => {
      figure.hidden = choices.some((c) => c.value && figure.dataset[c.name] !== c.value);
      left += !figure.hidden;
    });
    bar.querySelector("output").textContent = `${left} of ${figures.length} pictures`;
  };
  choices.forEach((choice) => choice.addEventListener("change", apply));
  filters.set(bar.dataset.run, apply);
  apply();
}

// Enlarging: the same pictures in a dialog; Escape, its button or a click beside it closes it.
const dialog = document.getElementById("enlarged");
if (dialog) {
  const body = dialog.querySelector("div");
  for (const pictures of document.querySelectorAll("figure .pictures")) {
    pictures.setAttribute("role", "button");
    pictures.setAttribute("aria-label", "Enlarge these pictures");
    onPress(pictures, () => {
      const caption = pictures.parentElement.querySelector("figcaption").cloneNode(true);
      const large = pictures.cloneNode(true);
      for (const name of ["role", "tabindex", "aria-label"]) large.removeAttribute(name);
      body.replaceChildren(large, caption);
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.querySelector("button").addEventListener("click", () => dialog.close());
}
