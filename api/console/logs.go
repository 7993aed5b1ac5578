package console

import (
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"yinjian/api/wire"
)

const (
	routeLog      = "GET /admin/v1/log"
	routeSetLog   = "POST /admin/v1/log"
	routeLogLines = "POST /admin/v1/log/lines"
	routeLogFile  = "POST /admin/v1/log/file"
)

var (
	logLevels = []string{"error", "warning", "info", "debug"}
	logLines  = []int{100, 500, 2000}
)

func logRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/logs"
		var s wire.LogStatus
		if err := p.ask(routeLog, nil, &s); err != nil {
			p.fail(err)
			return
		}
		data := map[string]any{"Log": s, "Levels": logLevels, "Choices": logLines}
		n, _ := strconv.Atoi(p.r.URL.Query().Get("lines"))
		if n != logLines[1] && n != logLines[2] {
			n = logLines[0]
		}
		if p.May(routeLogLines) && s.Folder != "" {
			var last struct {
				Lines []string `json:"lines"`
			}
			switch err := p.ask(routeLogLines, wire.ReadLog{Lines: n}, &last).(type) {
			case nil:
				data["Lines"] = readable(last.Lines)
			case *Refusal:
				data["Unread"] = err.Detail
			default:
				p.fail(err)
				return
			}
		}
		data["Most"] = n
		p.show("logs", data)
	}
	c.page("GET /console/logs", show)
	c.page("POST /console/logs", func(p *page) {
		body := values(p.Form, "level", "reason")
		if d := strings.TrimSpace(p.Form.Get("folder")); d != p.Form.Get("was") { // as it is, it is not touched
			body["directory"] = d
		}
		if v := whole(p.Form, "keep_days"); v != 0 {
			body["keep_days"] = v
		}
		p.acted(p.ask(routeSetLog, body, nil), "/console/logs", "changed", func() { show(p) })
	})
	c.page("GET /console/logs/file", func(p *page) {
		p.Section = "/console/logs"
		name := p.r.URL.Query().Get("name")
		// The end is what it is now: the file that is written grows meanwhile.
		for from, end := int64(0), int64(1); from < end; {
			var part wire.LogPart
			if err := p.ask(routeLogFile, wire.ReadLogFile{Name: name, From: int(from)}, &part); err != nil {
				if from == 0 {
					p.fail(err)
				}
				return // what was sent is shorter than it was announced: the browser says so
			}
			if from == 0 {
				end = part.Size
				p.w.Header().Set("Content-Length", strconv.FormatInt(end, 10))
				attach(p.w, name, "text/plain; charset=utf-8")
			}
			if len(part.Content) == 0 {
				return
			}
			part.Content = part.Content[:min(int64(len(part.Content)), end-from)]
			if !p.deliver(part.Content) {
				return
			}
			from += int64(len(part.Content))
		}
	})
}

// readable are lines without what a terminal or a browser could take for more than text.
func readable(lines []string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			return '·'
		}
		return r
	}, strings.Join(lines, "\n"))
}

const (
	pieceOf     = 1 << 20
	pieceWithin = 30 * time.Second
)

// deliver sends a file piece by piece, each within its time: a slow line takes what it takes, and who does not read is left. It
// reports whether all of it was sent.
func (p *page) deliver(content []byte) bool {
	for piece := range slices.Chunk(content, pieceOf) {
		// A writer without a deadline is bounded by its server's.
		_ = http.NewResponseController(p.w).SetWriteDeadline(time.Now().Add(pieceWithin)) // interval
		if _, err := p.w.Write(piece); err != nil {
			return false
		}
	}
	return true
}

// attach has the browser keep what follows as a file; opened by itself it may do nothing.
func attach(w http.ResponseWriter, name, media string) {
	h := w.Header()
	h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": name}))
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
	h.Set("Content-Type", media)
}
