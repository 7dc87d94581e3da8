// Make every table sortable by its headers. Without scripts the page has the same content.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((header, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort((a, b) => compare(a.cells[index], b.cells[index], down ? -1 : 1)));
    });
  });
}

// Missing values stay last in either order.
function compare(a, b, sign) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  if (x === undefined && y === undefined) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  if (x === "" || y === "") return (x === "") - (y === "");
  return sign * (Number(x) - Number(y));
}
