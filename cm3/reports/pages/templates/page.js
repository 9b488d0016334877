"use strict";

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

// Each table can be saved as CSV, with numbers in full precision where the cells have them.
const csvOf = (table) => {
  const text = (cell) => cell.dataset.value ?? cell.innerText.replace(/\s+/g, " ").trim();
  // A spreadsheet computes what begins like a formula.
  const plain = (value) => (/^[=+@-]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value);
  const quoted = (value) => (/[",]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return [...table.rows].map((row) => [...row.cells].map((cell) => quoted(plain(text(cell)))).join(",")).join("\r\n") + "\r\n";
};
for (const box of document.querySelectorAll(".scroll")) {
  const table = box.querySelector("table");
  if (!table) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "button small tools";
  button.textContent = "Save as CSV";
  button.setAttribute("aria-label", `Save as CSV: ${box.getAttribute("aria-label")}`);
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csvOf(table));
    link.download = `${document.title} ${box.getAttribute("aria-label")}`.replace(/[^A-Za-z0-9]+/g, "-").toLowerCase() + ".csv";
    link.click();
  });
  box.after(button);
}
