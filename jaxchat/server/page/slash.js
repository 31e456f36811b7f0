/* An address that lacks its last slash, such as /proxy/8000: all paths of the page are relative to it, so
   nothing else of the page is found there. The server names this file by its whole path (page.py). */

if (!location.pathname.endsWith("/")) location.replace(`${location.pathname}/${location.search}${location.hash}`);
