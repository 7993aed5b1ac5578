package plot_test

import (
	"bytes"
	"encoding/xml"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/ledger"
	"yinjian/ntp/plot"
)

var noon = time.Date(2026, 11, 22, 4, 0, 0, 0, time.UTC) // 12:00 in Beijing

// An element is one of a picture, with the group that it is in.
type element struct {
	name, group string
	attr        map[string]string
	text        string
}

// parse reads the picture as XML, strictly.
func parse(t *testing.T, svg []byte) (all []element) {
	t.Helper()
	dec := xml.NewDecoder(bytes.NewReader(svg))
	var groups []string
	var open []int
	for {
		tok, err := dec.Token()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatalf("not XML: %v\n%s", err, svg)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			e := element{name: tok.Name.Local, group: strings.Join(groups, "/"), attr: map[string]string{}}
			for _, a := range tok.Attr {
				e.attr[a.Name.Local] = a.Value
			}
			groups = append(groups, e.attr["class"]+e.attr["data-source"])
			all, open = append(all, e), append(open, len(all))
		case xml.EndElement:
			groups, open = groups[:len(groups)-1], open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				all[open[len(open)-1]].text += string(tok)
			}
		}
	}
}

func count(all []element, name, group string) (n int) {
	for _, e := range all {
		if e.name == name && strings.HasSuffix(e.group, group) {
			n++
		}
	}
	return n
}

func number(t *testing.T, s string) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// rounds are n of them, a minute apart: two sources, of which b is silent in every third and lies from half on.
func rounds(n int) (out []ledger.Point, b int) {
	for i := range n {
		p := ledger.Point{At: noon.Add(time.Duration(i) * time.Minute), State: ntp.Trusted, BoundUS: 2000}
		p.Sources = append(p.Sources, ledger.PointSource{Name: "北斗-1", OffsetUS: int64(i%7) * 100, Candidate: true})
		if i%3 != 0 {
			off := int64(-300)
			if i > n/2 {
				off = 5_000_000
			}
			p.Sources = append(p.Sources, ledger.PointSource{Name: `b"<&`, OffsetUS: off, Candidate: true, Rejected: i > n/2})
			b++
		}
		out = append(out, p)
	}
	return out, b
}

// Every answer has its mark, every state its stretch, and labels say what they are, in a picture that is XML whatever the
// sources are called.
func TestPoints(t *testing.T) {
	t.Parallel()
	const n = 60
	points, b := rounds(n)
	d := plot.Data{
		Title: "设备 <一号>", From: noon, To: noon.Add(n * time.Minute), Accuracy: time.Second, Zone: time.FixedZone("", 8*3600), Points: points,
		Changes: []ledger.Change{
			{At: noon.Add(-time.Hour), From: ntp.Acquiring, To: ntp.Trusted}, {At: noon.Add(20 * time.Minute), From: ntp.Trusted, To: ntp.Holdover},
			{At: noon.Add(30 * time.Minute), From: ntp.Holdover, To: ntp.Suspect},
		},
	}
	svg, err := plot.Draw(d)
	if err != nil {
		t.Fatal(err)
	}
	all := parse(t, svg)
	if got := count(all, "circle", "source北斗-1"); got != n {
		t.Errorf("%d marks of the first source, want %d", got, n)
	}
	if got := count(all, "circle", `sourceb"<&`); got != b {
		t.Errorf("%d marks of the second source, want %d", got, b)
	}
	hollow, states, labels := 0, []string{}, ""
	for _, e := range all {
		switch {
		case e.name == "circle" && e.attr["fill"] == "#ffffff":
			hollow++
		case e.name == "rect" && e.group == "/states":
			states = append(states, e.attr["data-state"])
			if e.attr["data-state"] == "holdover" { // a sixth of the time, beginning after a third
				if x, w := number(t, e.attr["x"]), number(t, e.attr["width"]); x < 92+1084/3.0-1 || x > 92+1084/3.0+1 || w < 1084/6.0-1 || w > 1084/6.0+1 {
					t.Errorf("hold-over at %v, wide %v", x, w)
				}
			}
		case e.name == "text":
			labels += e.text + "\n"
		}
	}
	if want := n / 3; hollow < want/2 || hollow > want {
		t.Errorf("%d hollow marks", hollow)
	}
	if got := strings.Join(states, " "); got != "trusted holdover suspect" {
		t.Errorf("states %q", got)
	}
	for _, w := range []string{"设备 <一号>", "12:00", "12:30", "+1 ms", "−100 ms", "+1 s", "准确度 ±1s", "可信 trusted", "可疑 suspect", "北京时间", "北斗-1", `b"<&`} {
		if !strings.Contains(labels, w) {
			t.Errorf("no label %q", w)
		}
	}
	if got := count(all, "polygon", "bound"); got != 1 {
		t.Errorf("%d bands", got)
	}
	// The line of a source is broken where it was silent: it has as many points as marks, in pieces.
	pieces, vertices := 0, 0
	for _, e := range all {
		if e.name == "polyline" && strings.HasSuffix(e.group, `sourceb"<&`) {
			pieces++
			vertices += len(strings.Fields(e.attr["points"]))
		}
	}
	if vertices != b || pieces != n/3 {
		t.Errorf("%d vertices in %d pieces, want %d in %d", vertices, pieces, b, n/3)
	}
}

// The vertical axis keeps order and sign, over all that a source may say.
func TestAxis(t *testing.T) {
	t.Parallel()
	var points []ledger.Point
	offsets := []int64{-86_400_000_000, -5_000_000, -1_000_000, -1500, -1000, -999, -1, 0, 1, 999, 1000, 1001, 250_000, 86_400_000_000}
	for i, off := range offsets {
		points = append(points, ledger.Point{At: noon.Add(time.Duration(i) * time.Minute), Sources: []ledger.PointSource{{Name: "a", OffsetUS: off}}})
	}
	svg, err := plot.Draw(plot.Data{From: noon, To: noon.Add(time.Hour), Accuracy: time.Second, Points: points})
	if err != nil {
		t.Fatal(err)
	}
	last, n := 1e9, 0
	for _, e := range parse(t, svg) {
		if e.name != "circle" {
			continue
		}
		y := number(t, e.attr["cy"])
		if y > last || y < 92 || y > 452 {
			t.Errorf("offset %d µs at %v, the one below at %v", offsets[n], y, last)
		}
		if offsets[n] == 0 && y != 272 {
			t.Errorf("zero at %v", y)
		}
		last = y
		n++
	}
	if n != len(offsets) {
		t.Errorf("%d marks, want %d", n, len(offsets))
	}
}

// Hours are bars, where there are no points; a gap in what was recorded stays white.
func TestHours(t *testing.T) {
	t.Parallel()
	hour := func(i int) ledger.Hour {
		return ledger.Hour{
			From: noon.Add(time.Duration(i) * time.Hour), To: noon.Add(time.Duration(i+1) * time.Hour), BoundMinUS: 1000, BoundMaxUS: 3000,
			StatesMS: map[ntp.State]int64{ntp.Trusted: 3600_000},
			Sources: []ledger.SourceHour{
				{Name: "a", Offsets: 9, MinUS: -500, MaxUS: 700, OffsetUS: 100, Candidates: 9}, {Name: "b", Offsets: 9, OffsetUS: 50, MinUS: 50, MaxUS: 50, Candidates: 9, Rejected: 9}, {Name: "silent"},
			},
		}
	}
	d := plot.Data{
		From: noon, To: noon.Add(12 * time.Hour), Accuracy: time.Second,
		Hours:   []ledger.Hour{{SpanMS: 5}, hour(0), hour(1), hour(2), hour(5), hour(6), hour(20)}, // the first without a time
		Points:  []ledger.Point{{At: noon.Add(7*time.Hour + time.Second), State: ntp.Untrusted, BoundUS: 5, Sources: []ledger.PointSource{{Name: "a", Candidate: true}}}},
		Changes: []ledger.Change{{At: noon.Add(6 * time.Hour), From: ntp.Trusted, To: ntp.Untrusted}},
	}
	svg, err := plot.Draw(d)
	if err != nil {
		t.Fatal(err)
	}
	all := parse(t, svg)
	a, b, bands := count(all, "circle", "sourcea"), count(all, "circle", "sourceb"), count(all, "polygon", "bound")
	ranges := 0
	for _, e := range all {
		if e.attr["class"] == "range" {
			ranges++
		}
	}
	if a != 6 || b != 5 || ranges != 5 || bands != 2 || count(all, "circle", "silent") != 0 {
		t.Errorf("%d marks of a, %d of b, %d ranges, %d bands; want 6, 5, 5, 2", a, b, ranges, bands)
	}
	states := 0
	for _, e := range all {
		if e.name == "rect" && e.group == "/states" {
			states++
			if x := number(t, e.attr["x"]); x > 92+1084*0.26 && x < 92+1084*0.41 {
				t.Errorf("state %s drawn over the gap at %v", e.attr["data-state"], x)
			}
		}
	}
	if states != 3 {
		t.Errorf("%d stretches, want 3", states)
	}
	// The memory begins within an hour, and has all of the next.
	d.Hours, d.Points = []ledger.Hour{hour(0), hour(1)}, nil
	for at := noon.Add(30 * time.Minute); at.Before(noon.Add(2 * time.Hour)); at = at.Add(10 * time.Minute) {
		d.Points = append(d.Points, ledger.Point{At: at, State: ntp.Trusted, BoundUS: 5, Sources: []ledger.PointSource{{Name: "a", Candidate: true}}})
	}
	if svg, err = plot.Draw(d); err != nil {
		t.Fatal(err)
	}
	if n := count(parse(t, svg), "circle", "sourcea"); n != 1+6 {
		t.Errorf("%d marks, want those of an hour and of six rounds", n)
	}
	if _, err := plot.Draw(plot.Data{From: noon, To: noon.Add(time.Hour), Accuracy: time.Second}); err == nil {
		t.Error("nothing was drawn without an error")
	}
	if _, err := plot.Draw(plot.Data{From: noon, To: noon}); err == nil {
		t.Error("an empty range was drawn")
	}
}

// The strip says nothing that nobody knew: a start that had no time for hours does not go on in the state that the one
// before it was in, what was before a start is not painted in the state that it began in, and a clock that never changed is
// shown as it was recorded.
func TestStates(t *testing.T) {
	t.Parallel()
	hour := func(from, to time.Duration, state ntp.State) ledger.Hour {
		return ledger.Hour{From: noon.Add(from), To: noon.Add(to), BoundMaxUS: 3000, StatesMS: map[ntp.State]int64{state: (to - from).Milliseconds()}}
	}
	change := func(at time.Duration, from, to ntp.State) ledger.Change {
		return ledger.Change{At: noon.Add(at), From: from, To: to}
	}
	const h = time.Hour
	var points []ledger.Point // of a start at two, without a time until four
	for at := 2 * h; at < 6*h; at += 5 * time.Minute {
		p := ledger.Point{At: noon.Add(at), State: ntp.Trusted, BoundUS: 5}
		if at < 4*h {
			p = ledger.Point{At: noon.Add(at), State: ntp.Cold}
		}
		points = append(points, p)
	}
	for name, c := range map[string]struct {
		data plot.Data
		want string
	}{
		"a start without a time": {plot.Data{
			Hours: []ledger.Hour{hour(0, h, ntp.Trusted)}, Points: points, Changes: []ledger.Change{change(-h, ntp.Acquiring, ntp.Trusted), change(4*h, ntp.Cold, ntp.Trusted)},
		}, "trusted 0-1 cold 2-4 trusted 4-6"},
		"a start after days without a change": {plot.Data{
			Hours: []ledger.Hour{hour(0, h, ntp.Trusted)}, Points: points, Changes: []ledger.Change{change(4*h, ntp.Cold, ntp.Trusted)},
		}, "trusted 0-1 cold 2-4 trusted 4-6"},
		"no change": {plot.Data{Hours: []ledger.Hour{hour(0, h, ntp.Trusted), hour(h, 2*h, ntp.Trusted)}, Points: points[24:]}, "trusted 0-2 trusted 4-6"},
		"changes without a start": {plot.Data{
			Points: points, Changes: []ledger.Change{change(3*h, ntp.Trusted, ntp.Holdover), change(5*h, ntp.Holdover, ntp.Trusted)},
		}, "trusted 2-3 holdover 3-5 trusted 5-6"},
	} {
		c.data.From, c.data.To, c.data.Accuracy = noon, noon.Add(6*h), time.Second
		svg, err := plot.Draw(c.data)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range parse(t, svg) {
			if e.name == "rect" && e.group == "/states" {
				at := func(x float64) string { return strconv.FormatFloat((x-92)/1084*6, 'f', 0, 64) }
				got = append(got, e.attr["data-state"], at(number(t, e.attr["x"]))+"-"+at(number(t, e.attr["x"])+number(t, e.attr["width"])))
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", name, strings.Join(got, " "), c.want)
		}
	}
}
