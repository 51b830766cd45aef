"use strict";
// Names come from files: they are put into the page as text, never as markup, and into charts as data.
(async () => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const unpack = async () => {
    const bytes = Uint8Array.from(atob(byId("packed").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };
  const report = await unpack();
  const tables = report.tables;
  const sources = report.sources.length;
  const tail = (path) => {
    const parts = path.split("/").filter((part) => part !== "");
    return parts.length ? parts[parts.length - 1] : path;
  };
  const short = (text, most) => (text.length <= most ? text : `${text.slice(0, most - 1)}…`);
  // Two sources may be called alike, and number tells them apart.
  const nameOf = (number) => `${number}: ${short(tail(report.sources[number].path), 24)}`;
  const heads = Object.keys(report.measures);
  const kindOf = (column) => column.split(".")[0];
  const titleOf = (column) => {
    const [kind, ...numbers] = column.split(".");
    const words = kind.replaceAll("_", " ");
    return numbers.length ? `${words} ${numbers.join("·")}` : words;
  };
  const longTitleOf = (column) => {
    const [kind, ...numbers] = column.split(".");
    const words = kind.replaceAll("_", " ");
    return numbers.length ? `${words}, ${numbers.map((n) => nameOf(Number(n))).join(" and ")}` : words;
  };
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "string") return value;
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(3);
  };
  const layerName = (layer) => (layer === "" ? "(no layer)" : layer);

  // ---- tables -------------------------------------------------------------------------------
  const plainTable = (into, columns, rows, caption) => {
    const table = make("table");
    if (caption) table.append(make("caption", caption));
    const head = make("tr");
    columns.forEach((column, at) => head.append(make("th", column, { scope: "col", class: rows.some((row) => at > 0 && typeof row[at] === "string") ? "text" : "" })));
    table.append(make("thead"));
    table.tHead.append(head);
    const body = table.createTBody();
    for (const row of rows) {
      const line = make("tr");
      row.forEach((cell, at) => {
        const text = number(cell);
        line.append(at === 0 ? make("th", text, { scope: "row" }) : make("td", text, typeof cell === "string" ? { class: "text" } : {}));
      });
      body.append(line);
    }
    into.append(table);
  };

  // ---- beginning ----------------------------------------------------------------------------
  const merged = tables.tensors.name ? tables.tensors.name.length : 0;
  const elements = tables.model.numel ? tables.model.numel[0] : 0;
  byId("about").textContent = `${report.kind} by ${report.method} (${report.semantics}); ${merged.toLocaleString("en")} tensors with ${elements.toLocaleString("en")} elements, by ${report.vectors}.`;
  if (report.base !== null) byId("models").append(make("li", `base: ${report.base}`));
  for (const each of report.sources) byId("models").append(make("li", `${each.number}: ${each.path}${each.adapter ? ` with ${each.adapter}` : ""}`));
  if (report.advice.length === 0) byId("advice").append(make("li", "Nothing stands out by arithmetic alone.", { class: "quiet" }));
  for (const each of report.advice) byId("advice").append(make("li", each.text));
  const ofSource = heads.filter((head) => `${head}.0` in tables.model || report.sources.some((s) => `${head}.${s.number}` in tables.model));
  const shownOfSource = ofSource.filter((head) => head !== "largest_at");
  plainTable(byId("model"), ["source", ...shownOfSource.map((head) => head.replaceAll("_", " "))],
    report.sources.map((each) => [nameOf(each.number), ...shownOfSource.map((head) => (tables.model[`${head}.${each.number}`] || [null])[0])]),
    "The whole model");
  plainTable(byId("model"), ["number", "value", "meaning"],
    heads.filter((head) => head in tables.model).map((head) => [head.replaceAll("_", " "), tables.model[head][0], report.measures[head]]));

  // ---- charts -------------------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const printing = matchMedia("print");
  // Okabe and Ito's colours, which most people tell apart, and dashes for those who do not.
  const palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00", "#7F7F7F"];
  const isDark = () => dark.matches && !printing.matches;
  const config = () => {
    const ink = isDark() ? "#e6e9ed" : "#1c2026", line = isDark() ? "#343b44" : "#d7dce2";
    return {
      background: "transparent", font: "system-ui, DejaVu Sans, sans-serif",
      axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, labelLimit: 180 },
      legend: { labelColor: ink, titleColor: ink, labelLimit: 220 }, title: { color: ink }, view: { stroke: line },
      range: { category: isDark() ? ["#56B4E9", "#E69F00", "#2fc79a", "#CC79A7", "#F0E442", "#7db7f5", "#D55E00", "#b0b0b0"] : palette },
    };
  };
  const tooltips = { theme: "custom", sanitize: (value) => String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;") };
  // Vega warns of each size and legend that it settles by itself, which readers can do nothing about.
  console.warn = () => {};
  const views = new Map();
  const draw = async (id, spec, description) => {
    const into = byId(id);
    const turn = (into.turn = (into.turn || 0) + 1);
    const width = Math.max(220, into.clientWidth - 20);
    const made = { autosize: { type: "fit-x", contains: "padding" }, width, description, ...spec };
    const holder = make("div");
    const result = await vegaEmbed(holder, made, {
      mode: "vega-lite", actions: false, renderer: "svg", config: config(),
      tooltip: { ...tooltips, theme: isDark() ? "dark" : "light" },
      loader: { load: () => Promise.reject(new Error("this page loads nothing")) },
    });
    if (into.turn !== turn) { result.finalize(); return; }
    if (views.has(id)) views.get(id).finalize();
    views.set(id, result);
    into.replaceChildren(holder);
  };
  const diverges = (head) => ["cosine", "aligned"].includes(kindOf(head));
  const colours = (head, values) => {
    if (diverges(head)) return { scheme: "blueorange", domain: [-1, 1], domainMid: 0 };
    const given = values.filter((value) => value !== null && value !== undefined);
    const least = Math.min(...given), most = Math.max(...given);
    const scale = { scheme: isDark() ? "viridis" : "viridis" };
    if (least > 0 && most / least > 1000) return { ...scale, type: "log" };
    return scale;
  };
  const cells = tables.cells;
  const layers = tables.layers.layer || [];
  const modules = tables.modules.module || [];
  const numeric = (table) => Object.keys(table).filter((head) => kindOf(head) in report.measures && kindOf(head) !== "largest_in" && kindOf(head) !== "largest_at");
  const drawMap = async () => {
    const head = byId("map-number").value;
    byId("map-meaning").textContent = report.measures[kindOf(head)];
    const few = layers.slice(0, 400), columns = modules.slice(0, 60);
    const known = new Set(columns);
    const rows = cells.layer.map((layer, at) => ({ layer: layerName(layer), module: cells.module[at], value: cells[head][at], numel: cells.numel[at] }))
      .filter((row) => row.value !== null && known.has(row.module));
    const inMap = new Set(rows.map((row) => row.layer));
    const order = few.map(layerName).filter((name) => inMap.has(name));
    // Modules outside of all layers would be a column each with one cell.
    const inside = new Set(rows.filter((row) => row.layer !== "(no layer)").map((row) => row.module));
    const shown = inside.size ? rows.filter((row) => inside.has(row.module) || row.layer !== "(no layer)") : rows;
    const across = columns.filter((module) => shown.some((row) => row.module === module));
    await draw("map", {
      data: { values: shown }, height: { step: order.length > 60 ? 9 : 18 },
      mark: { type: "rect", tooltip: true },
      encoding: {
        x: { field: "module", type: "nominal", sort: across, axis: { labelAngle: -40, title: null, orient: "top", labelLimit: 140 } },
        y: { field: "layer", type: "nominal", sort: order, axis: { title: null, labelOverlap: true } },
        color: { field: "value", type: "quantitative", scale: colours(head, shown.map((row) => row.value)), legend: { title: short(titleOf(head), 20), orient: "bottom", gradientLength: 200 } },
        tooltip: [{ field: "layer", title: "layer" }, { field: "module", title: "module" }, { field: "value", title: titleOf(head), format: ".5~g" }, { field: "numel", title: "elements", format: "," }],
      },
    }, `Heat map of ${longTitleOf(head)} by layer and module; the table of tensors below has the numbers.`);
  };
  const drawCurve = async () => {
    const kind = byId("depth-number").value;
    byId("depth-meaning").textContent = report.measures[kind];
    const rows = [];
    const numbered = layers.map((layer, at) => [layer, at]).filter(([layer]) => layer !== "");
    for (const head of numeric(tables.layers).filter((each) => kindOf(each) === kind)) {
      const [, ...numbers] = head.split(".");
      const line = numbers.length ? numbers.map((each) => nameOf(Number(each))).join(" & ") : kind.replaceAll("_", " ");
      numbered.forEach(([layer, at], place) => {
        if (tables.layers[head][at] !== null) rows.push({ place, layer, line, value: tables.layers[head][at] });
      });
    }
    if (rows.length === 0) { byId("curve").replaceChildren(make("p", "No tensor lies in a numbered layer.", { class: "quiet" })); return; }
    // A tick is called by its layer's number; only digits go into the expression.
    const labels = numbered.map(([layer]) => (layer.match(/[0-9]+$/) || [""])[0]);
    const every = Math.ceil(numbered.length / Math.max(4, Math.floor(byId("curve").clientWidth / 50)));
    const ticks = numbered.map((_, place) => place).filter((place) => place % every === 0);
    const tip = [{ field: "layer", title: "layer" }, { field: "line", title: "of" }, { field: "value", title: kind.replaceAll("_", " "), format: ".5~g" }];
    await draw("curve", {
      data: { values: rows }, height: 260,
      encoding: {
        x: { field: "place", type: "quantitative", axis: { title: "layer", values: ticks, grid: false, labelExpr: `${JSON.stringify(labels)}[datum.value]` }, scale: { nice: false } },
        y: { field: "value", type: "quantitative", title: kind.replaceAll("_", " "), scale: { zero: false } },
        color: { field: "line", type: "nominal", legend: { title: null, orient: "bottom", columns: 2 } },
      },
      layer: [{ mark: { type: "line" }, encoding: { strokeDash: { field: "line", type: "nominal", legend: null } } }, { mark: { type: "point", filled: true, size: numbered.length > 100 ? 12 : 40 }, encoding: { tooltip: tip, shape: { field: "line", type: "nominal", legend: null } } }],
    }, `${kind.replaceAll("_", " ")} over the depth, a line per source; the table has the numbers.`);
  };
  const drawCosines = async () => {
    const rows = [];
    for (let one = 0; one < sources; one++) for (let other = 0; other < sources; other++) {
      const head = `cosine.${Math.min(one, other)}.${Math.max(one, other)}`;
      const value = one === other ? 1 : (tables.model[head] || [null])[0];
      if (value !== null) rows.push({ one: nameOf(one), other: nameOf(other), value, text: value.toFixed(3) });
    }
    const order = report.sources.map((each) => nameOf(each.number));
    if (sources < 2 || rows.length === 0) { byId("cosines").replaceChildren(make("p", "There is one source.", { class: "quiet" })); return; }
    await draw("cosines", {
      data: { values: rows }, height: { step: 34 },
      encoding: {
        x: { field: "one", type: "nominal", sort: order, axis: { title: null, orient: "top", labelAngle: sources > 4 ? -40 : 0 } },
        y: { field: "other", type: "nominal", sort: order, axis: { title: null } },
        tooltip: [{ field: "one", title: "of" }, { field: "other", title: "and" }, { field: "value", title: "cosine", format: ".6f" }],
      },
      layer: [
        { mark: "rect", encoding: { color: { field: "value", type: "quantitative", scale: { scheme: "blueorange", domain: [-1, 1], domainMid: 0 }, legend: { title: "cosine", orient: "bottom", gradientLength: 200 } } } },
        { mark: { type: "text", fontSize: sources > 8 ? 8 : 12 }, encoding: { text: { field: "text" }, color: { condition: { test: "abs(datum.value) > 0.55", value: "#ffffff" }, value: "#1c2026" } } },
      ],
    }, "Matrix of cosines between the sources' vectors over the whole model.");
  };
  const drawHistogram = async () => {
    const edges = report.histograms.edges, rows = [], rules = [];
    byId("sizes-meaning").textContent = `How large the elements of each source's vector are, for one element in ${report.histograms.sampled}; dashed lines are the largest and the smallest threshold of its tensors. Zeros are left out.`;
    report.histograms.counts.forEach((counts, source) => {
      const total = counts.reduce((sum, each) => sum + each, 0);
      counts.forEach((count, at) => {
        if (at === 0 || count === 0) return;
        const to = edges[at + 1] || edges[at] * 4 / 3;
        // Bins are not equally wide on this axis, and areas should compare.
        rows.push({ line: nameOf(source), size: edges[at], to, share: count / total, density: count / total / Math.log2(to / edges[at]) });
      });
      const given = (tables.tensors[`threshold.${source}`] || []).filter((value) => value !== null && value > 0);
      if (given.length) for (const size of new Set([given.reduce((a, b) => Math.min(a, b)), given.reduce((a, b) => Math.max(a, b))])) rules.push({ line: nameOf(source), size });
    });
    if (rows.length === 0) { byId("histogram").replaceChildren(make("p", "Nothing but zeros was sampled.", { class: "quiet" })); return; }
    const colour = { field: "line", type: "nominal", legend: { title: null, orient: "bottom", columns: 2 }, sort: report.sources.map((each) => nameOf(each.number)) };
    const x = { field: "size", type: "quantitative", scale: { type: "log", nice: false }, axis: { title: "magnitude", format: ".0e", labelOverlap: true } };
    await draw("histogram", {
      height: 240,
      layer: [
        { data: { values: rows }, mark: { type: "line", interpolate: "step-after", tooltip: true }, encoding: { x, y: { field: "density", type: "quantitative", title: "share of elements per doubling" }, color: colour, strokeDash: { field: "line", type: "nominal", legend: null } } },
        { data: { values: rows }, mark: { type: "point", opacity: 0, size: 60 }, encoding: { x, y: { field: "density", type: "quantitative" }, tooltip: [{ field: "line", title: "of" }, { field: "size", title: "from", format: ".3e" }, { field: "to", title: "to", format: ".3e" }, { field: "share", title: "share", format: ".3%" }] } },
        { data: { values: rules }, mark: { type: "rule", strokeDash: [2, 3] }, encoding: { x, color: colour, tooltip: [{ field: "line", title: "threshold of" }, { field: "size", title: "magnitude", format: ".4e" }] } },
      ],
    }, "Histogram of the magnitudes of each source's vector, with the thresholds of its tensors.");
  };
  const fill = (id, values, text) => {
    const select = byId(id);
    for (const value of values) select.append(make("option", text(value), { value }));
  };
  const mapNumbers = merged ? numeric(cells) : [];
  fill("map-number", mapNumbers, longTitleOf);
  const depthNumbers = merged ? [...new Set(numeric(tables.layers).map(kindOf))] : [];
  fill("depth-number", depthNumbers, (kind) => kind.replaceAll("_", " "));
  const prefer = (id, wanted) => { for (const each of wanted) if ([...byId(id).options].some((option) => option.value === each)) { byId(id).value = each; return; } };
  prefer("map-number", ["conflicts", "relative.0", "norm.0"]);
  prefer("depth-number", ["relative", "norm"]);
  const drawAll = () => (merged ? Promise.all([drawMap(), drawCurve(), drawCosines(), drawHistogram()]) : Promise.resolve());
  byId("map-number").addEventListener("change", drawMap);
  byId("depth-number").addEventListener("change", drawCurve);
  const densities = report.densities || [];
  const fractions = densities.length ? Object.keys(densities[0]) : [];
  if (fractions.length) plainTable(byId("densities"), ["source", ...fractions.map((each) => `${Number(each) * 100} %`)],
    densities.map((row, at) => [nameOf(at), ...fractions.map((each) => row[each])]),
    "Density that keeps so much of the norm, as the sample tells it");

  // ---- table of tensors ---------------------------------------------------------------------
  const STEP = 200;
  const all = tables.tensors;
  const state = { sort: null, down: true, shown: STEP, filter: "", columns: "all" };
  const groups = [["all", "all"], ...report.sources.map((each) => [String(each.number), nameOf(each.number)]), ["pairs", "pairs"]];
  for (const [value, text] of groups) byId("columns").append(make("option", text, { value }));
  const always = ["numel", "change", "conflicts"];
  const columnsShown = () => {
    const measured = Object.keys(all).filter((head) => !["name", "layer", "module"].includes(head));
    if (state.columns === "all") return sources <= 3 ? measured : measured.filter((head) => head.split(".").length < 3);
    if (state.columns === "pairs") return measured.filter((head) => head.split(".").length === 3);
    return measured.filter((head) => always.includes(head) || (head.split(".").length === 2 && head.split(".")[1] === state.columns));
  };
  const list = () => {
    const names = all.name || [];
    const words = state.filter.toLowerCase();
    const places = names.map((_, at) => at).filter((at) => names[at].toLowerCase().includes(words));
    if (state.sort !== null) {
      const column = all[state.sort];
      const empty = (value) => value === null || value === undefined;
      places.sort((a, b) => {
        const one = column[a], other = column[b];
        if (empty(one) || empty(other)) return empty(one) - empty(other) || a - b;
        const order = typeof one === "string" ? (one < other ? -1 : one > other ? 1 : 0) : one - other;
        return (state.down ? -order : order) || a - b;
      });
    }
    return places;
  };
  const drawTable = () => {
    const columns = columnsShown(), table = byId("table"), places = list();
    const head = make("tr");
    for (const column of ["name", ...columns]) {
      const sorted = state.sort === column ? (state.down ? "descending" : "ascending") : "none";
      const cell = make("th", undefined, { scope: "col", "aria-sort": sorted });
      const arrow = sorted === "none" ? "" : state.down ? " ↓" : " ↑";
      const button = make("button", titleOf(column) + arrow, { type: "button", "data-column": column, title: column === "name" ? "Name of the tensor" : column === "numel" ? "Elements" : `${longTitleOf(column)}: ${report.measures[kindOf(column)] || ""}` });
      cell.append(button);
      head.append(cell);
    }
    table.tHead.replaceChildren(head);
    const lines = places.slice(0, state.shown).map((at) => {
      const line = make("tr");
      line.append(make("th", all.name[at], { scope: "row" }));
      for (const column of columns) line.append(make("td", number(all[column][at])));
      return line;
    });
    table.tBodies[0].replaceChildren(...lines);
    byId("count").textContent = `${Math.min(state.shown, places.length).toLocaleString("en")} of ${places.length.toLocaleString("en")} tensors`;
    byId("more").hidden = places.length <= state.shown;
  };
  byId("table").tHead.addEventListener("click", (event) => {
    const column = event.target.dataset && event.target.dataset.column;
    if (!column) return;
    state.down = state.sort === column ? !state.down : column !== "name";
    state.sort = column;
    drawTable();
    for (const button of byId("table").tHead.querySelectorAll("button")) if (button.dataset.column === column) button.focus();
  });
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; state.shown = STEP; drawTable(); });
  byId("columns").addEventListener("change", (event) => { state.columns = event.target.value; drawTable(); });
  byId("more").addEventListener("click", () => { state.shown += 5 * STEP; drawTable(); });
  drawTable();

  // ---- end ----------------------------------------------------------------------------------
  const copied = report.copied;
  if (copied.name.length) plainTable(byId("copied"), ["tensor", "what", "elements", "why"], copied.name.slice(0, 1000).map((name, at) => [name, copied.action[at], copied.numel[at], copied.reason[at]]),
    copied.name.length > 1000 ? `The first 1,000 of ${copied.name.length}; the data has all.` : undefined);
  else if (report.kind !== "comparison") byId("copied").append(make("p", "Every tensor was merged.", { class: "quiet" }));
  if (report.kind === "comparison") {
    byId("kept").querySelector("h2").textContent = "Equal, and not comparable";
    byId("copied").append(make("p", `${report.identical.length.toLocaleString("en")} tensors are identical, ${report.changed.length.toLocaleString("en")} changed.`));
    for (const [name, what] of [["partial", "only in"], ["shapes", "shapes"], ["types", "types"]]) {
      const table = report[name], values = table[Object.keys(table).find((head) => head !== "name")];
      if (table.name.length) plainTable(byId("copied"), ["tensor", what], table.name.slice(0, 1000).map((each, at) => [each, values[at].map((value) => (value === null ? "–" : Array.isArray(value) ? `[${value.join(", ")}]` : String(value))).join(", ")]));
    }
  }
  if (report.dropped.length) byId("copied").append(make("p", `Dropped: ${short(report.dropped.join(", "), 2000)}`));
  const run = report.run;
  const size = (bytes) => { let unit = 0; while (bytes >= 1024 && unit < 4) { bytes /= 1024; unit++; } return `${bytes.toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`; };
  if (run === null) byId("stages").append(make("p", "Nothing is known of the run.", { class: "quiet" }));
  else {
    plainTable(byId("stages"), ["stage", "thread-seconds", "bytes"], Object.entries(run.seconds_by_stage).map(([stage, seconds]) => [stage, seconds, run.bytes_by_stage[stage] === undefined ? null : size(run.bytes_by_stage[stage])]),
      `${run.seconds} s in all; memory ${size(run.measured_memory)} of ${size(run.memory_budget)} allowed, ${size(run.projected_memory)} planned`);
  }
  byId("recipe").textContent = report.recipe;
  if (report.recipe === "") for (const element of [byId("recipe"), byId("recipe").previousElementSibling]) element.hidden = true;
  if (report.notes.length) {
    const notes = make("ul");
    for (const each of report.notes.slice(0, 200)) notes.append(make("li", each));
    byId("notes").append(make("h3", "Notes"), notes);
  }
  await drawAll();
  dark.addEventListener("change", drawAll);
  printing.addEventListener("change", drawAll);
  let waiting = 0, width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (document.documentElement.clientWidth !== width) { width = document.documentElement.clientWidth; drawAll(); } }, 150);
  });
  document.documentElement.dataset.ready = "yes";
})();
