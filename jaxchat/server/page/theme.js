/* The theme before the first paint: "light", "dark", or nothing for what the system says.
   Not a module, because modules run after the page has been drawn. settings.js changes it later. */

try {
  const { theme } = JSON.parse(localStorage.getItem("jaxchat.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage, or not ours: the system's theme
}
