/* What the first paint must not get wrong: the theme ("light", "dark", or nothing for what the system
   says), and whether the list is there. Not a module, because modules run after the page has been
   drawn. settings.js and sidebar.js change them later. */

try {
  document.documentElement.classList.toggle("side-away", localStorage.getItem("jaxchat.sideAway") === "true");
  const { theme } = JSON.parse(localStorage.getItem("jaxchat.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage, or not ours: the system's theme
}
