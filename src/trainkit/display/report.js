"use strict";
// The page is complete without this script. It lets a click on a column sort a table, and prints folded parts.
const NUMBER = /^([-+]?[\d.,]+(?:e[-+]?\d+)?)(?: ± .*)?$/;

function value(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.sort !== undefined) return cell.dataset.sort === "nan" ? NaN : Number(cell.dataset.sort);
  const text = cell.textContent.trim();
  const number = NUMBER.exec(text);
  if (number) return Number(number[1].replaceAll(",", ""));
  return text === "nan" ? NaN : text;
}

function compare(a, b, sign) {
  const empty = (x) => x === "" || x === "-" || Number.isNaN(x);
  if (empty(a) || empty(b)) return empty(a) - empty(b); // always last
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * a.localeCompare(b, "en", { numeric: true });
}

function sort(table, column) {
  const headers = [...table.tHead.rows[0].cells];
  const sign = headers[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  headers.forEach((header) => header.removeAttribute("aria-sort"));
  headers[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => compare(value(a, column), value(b, column), sign));
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(table, column));
    header.append(button);
  });
}

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));
