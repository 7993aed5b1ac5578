package gnss

import (
	"fmt"
	"strings"
	"time"
)

// A Fix says what a receiver claims about its position and time.
type Fix int

const (
	Fixed  Fix = iota // position and time valid
	NoFix             // the receiver talks, but says that it sees no sky
	Silent            // no sentence at all: receiver or cable gone
)

// Sentences returns what a BeiDou receiver sends for one second, in NMEA 0183 version 4.0 with the BD talker: RMC, GGA,
// GSA, GSV, ZDA, each with checksum and CR LF. The place is a fixed one in Beijing. It is empty if Silent.
func Sentences(t time.Time, fix Fix) string {
	if fix == Silent {
		return ""
	}
	t = t.UTC().Truncate(time.Second)
	clock, date := t.Format("150405.00"), t.Format("020106")
	const place = "3954.2400,N,11624.6600,E"
	var b strings.Builder
	put := func(format string, args ...any) {
		body := fmt.Sprintf(format, args...)
		fmt.Fprintf(&b, "$%s*%02X\r\n", body, checksum(body))
	}
	if fix == NoFix {
		put("BDRMC,%s,V,,,,,,,%s,,,N", clock, date)
		put("BDGGA,%s,,,,,0,00,99.9,,,,,,", clock)
		put("BDGSA,A,1,,,,,,,,,,,,,99.9,99.9,99.9")
		return b.String()
	}
	put("BDRMC,%s,A,%s,0.00,0.00,%s,,,A", clock, place, date)
	put("BDGGA,%s,%s,1,08,1.0,45.0,M,-9.0,M,,", clock, place)
	put("BDGSA,A,3,01,02,03,04,05,06,07,08,,,,,1.6,1.0,1.2")
	put("BDGSV,2,1,08,01,45,125,44,02,38,230,42,03,52,190,45,04,33,115,41")
	put("BDGSV,2,2,08,05,20,250,38,06,65,010,47,07,48,310,43,08,57,070,46")
	put("BDZDA,%s,%s,00,00", clock, t.Format("02,01,2006"))
	return b.String()
}

// checksum is the exclusive or of the bytes between $ and *.
func checksum(body string) byte {
	var sum byte
	for i := range len(body) {
		sum ^= body[i]
	}
	return sum
}
