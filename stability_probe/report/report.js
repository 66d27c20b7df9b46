"use strict";
// A click on a heading sorts the table by that column, a second one the other way round.
const keyOf = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();

const compare = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
};

const sort = (table, head) => {
  const column = head.cellIndex;
  const way = head.ariaSort === "ascending" ? -1 : 1;
  const [filled, empty] = [[], []];
  for (const row of table.tBodies[0].rows) (keyOf(row, column) === "" ? empty : filled).push(row);
  filled.sort((a, b) => way * compare(keyOf(a, column), keyOf(b, column)));
  table.tBodies[0].append(...filled, ...empty); // what has no value stays last
  for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
  head.ariaSort = way === 1 ? "ascending" : "descending";
};

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("button")?.closest("th");
    if (head) sort(table, head);
  });
}
