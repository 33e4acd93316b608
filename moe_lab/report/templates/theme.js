"use strict";
// The theme of the page: system, light or dark. `now` is the one that is seen, `follow` calls a function with each new one.
const theme = (() => {
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme"), order = ["system", "light", "dark"], followers = [];
  const named = () => document.documentElement.dataset.theme || "system";
  const now = () => document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light");
  const label = () => { toggle.textContent = `Theme: ${named()}`; };
  const changed = () => followers.forEach((follower) => follower(now()));
  toggle.hidden = false;
  label();
  toggle.addEventListener("click", () => {
    const next = order[(order.indexOf(named()) + 1) % order.length];
    if (next === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = next;
    try { localStorage.setItem("moe-lab-theme", next); } catch (error) { /* not kept, still applied */ }
    label();
    changed();
  });
  systemDark.addEventListener("change", changed);
  return { now, follow: (follower) => followers.push(follower) };
})();
