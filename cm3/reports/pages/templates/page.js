"use strict";

// Images stand once in the page, as a table by item, and go into their <img> when they come near the screen.
const table = document.getElementById("images");
const images = table ? JSON.parse(table.textContent) : {};
const waiting = [...document.querySelectorAll("img[data-image]")];
const show = (image) => {
  if (!image.src) image.src = images[image.dataset.image];
};
if ("IntersectionObserver" in window) {
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        show(entry.target);
        watcher.unobserve(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  waiting.forEach((image) => watcher.observe(image));
} else {
  waiting.forEach(show);
}
window.addEventListener("beforeprint", () => waiting.forEach(show));

// A chooser shows one of its panels; without this script all of them are seen.
for (const chooser of document.querySelectorAll(".chooser")) {
  const select = chooser.querySelector("select");
  const panels = [...document.querySelectorAll(`[data-panel="${chooser.dataset.for}"]`)];
  const turn = () => panels.forEach((panel, number) => (panel.hidden = number !== select.selectedIndex));
  chooser.hidden = panels.length < 2;
  select.addEventListener("change", turn);
  for (const button of chooser.querySelectorAll("button[data-step]")) {
    button.addEventListener("click", () => {
      const step = Number(button.dataset.step);
      select.selectedIndex = (select.selectedIndex + step + panels.length) % panels.length;
      turn();
    });
  }
  turn();
}

// Columns sort by their buttons, the best first; equal rows keep their order, rows without a value stay last.
const sortBy = (heading) => {
  const body = heading.closest("table").tBodies[0];
  const first = heading.dataset.first || "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  heading.parentElement.querySelectorAll("[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent.trim();
  const numeric = heading.dataset.sort === "number";
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
  };
  body.append(...[...body.rows].sort(compare));
};
for (const button of document.querySelectorAll("th[data-sort] button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// Commands are copied by a button; a page from disk may not be let near the clipboard, then the text is selected.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
}
