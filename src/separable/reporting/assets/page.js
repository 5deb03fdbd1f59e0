"use strict";
(() => {
  const table = document.getElementById("layers");
  const body = table.tBodies[0];
  const rows = [...body.rows]; // in network order
  const filter = document.getElementById("filter");
  const foldAll = document.getElementById("fold");
  const shown = document.getElementById("shown");
  const folded = new Set();
  let sorted = null; // the column's header and the direction, or null for network order

  const holders = rows.filter((row) => row.classList.contains("holder"));
  const inside = (name, holder) => holder === "" ? name !== "" : name.startsWith(`${holder}.`);

  function draw() {
    const words = filter.value.trim().toLowerCase();
    const flat = words !== "" || sorted !== null;
    table.classList.toggle("flat", flat);
    let count = 0;
    for (const row of rows) {
      const { name } = row.dataset;
      const visible = flat
        ? !(sorted && row.classList.contains("holder")) && row.dataset.words.includes(words)
        : ![...folded].some((holder) => inside(name, holder));
      row.hidden = !visible;
      count += visible;
    }
    shown.textContent = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
    foldAll.textContent = folded.size ? "Expand all" : "Collapse all";
  }

  function order() {
    for (const header of table.tHead.querySelectorAll("[aria-sort]")) header.removeAttribute("aria-sort");
    let ordered = rows;
    if (sorted) {
      sorted.header.setAttribute("aria-sort", sorted.descending ? "descending" : "ascending");
      const value = (row) => {
        const text = row.cells[sorted.column].dataset.value;
        return sorted.numeric ? Number(text) : text;
      };
      const sign = sorted.descending ? -1 : 1;
      ordered = [...rows].sort((a, b) =>
        sign * (sorted.numeric ? value(a) - value(b) : value(a).localeCompare(value(b))));
    }
    body.append(...ordered);
  }

  for (const row of rows) {
    const text = ["th", ".became"].map((part) => row.querySelector(part)?.textContent ?? "");
    row.dataset.words = [row.dataset.name, ...text].join(" ").toLowerCase();
  }

  // each sorting title belongs to a column of the body, wherever the head groups them
  const titles = [...table.tHead.querySelectorAll(".sort")];
  const numeric = (button) => button.closest("th").classList.contains("number");
  const columns = rows[0] ? [...rows[0].cells].flatMap((cell, i) => cell.dataset.value === undefined ? [] : [i]) : [];
  const inOrder = [
    ...titles.filter((button) => !numeric(button)).slice(0, 1),
    ...titles.filter(numeric),
    ...titles.filter((button) => !numeric(button)).slice(1),
  ];
  inOrder.forEach((button, i) => {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const again = sorted?.header === header;
      const descending = again ? !sorted.descending : numeric(button);
      sorted = { header, column: columns[i], numeric: numeric(button), descending };
      order();
      draw();
    });
  });

  for (const holder of holders) {
    const button = holder.querySelector(".fold");
    button.addEventListener("click", () => {
      const { name } = holder.dataset;
      if (!folded.delete(name)) folded.add(name);
      button.setAttribute("aria-expanded", String(!folded.has(name)));
      draw();
    });
  }
  foldAll.addEventListener("click", () => {
    const expand = folded.size > 0;
    folded.clear();
    for (const holder of holders) {
      // the network itself stays open, or nothing would be left to see
      const closed = !expand && holder.dataset.name !== "";
      if (closed) folded.add(holder.dataset.name);
      holder.querySelector(".fold").setAttribute("aria-expanded", String(!closed));
    }
    sorted = null;
    filter.value = "";
    order();
    draw();
  });
  document.getElementById("order").addEventListener("click", () => {
    sorted = null;
    order();
    draw();
  });
  filter.addEventListener("input", draw);

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme === "dark" ||
      (root.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);
    root.style.colorScheme = dark ? "light" : "dark";
  });

  addEventListener("beforeprint", () => window.Plotly && document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot)));
  draw();
})();
