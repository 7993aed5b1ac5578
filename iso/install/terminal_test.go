//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pty is a pseudo terminal: what a person has, and what the program has.
func pty(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

// A share stands on the terminal where its holder pressed Enter, and on no other; what was typed ahead shows none and skips none.
func TestSharesAreShownToOne(t *testing.T) {
	t.Parallel()
	screen, tty0 := pty(t)
	line, tty1 := pty(t)
	v := &volume{con: consoleOf(everywhere{tty0, tty1}), secret: t.TempDir()}
	v.run = func(context.Context, []byte, string, ...string) ([]byte, error) { return nil, nil }
	people := map[string]*os.File{"screen": screen, "line": line}
	shown := map[string]string{}
	// until answers what is shown up to that text, and goes on behind it.
	until := func(who, text string) string {
		t.Helper()
		b := make([]byte, 4096)
		for !strings.Contains(shown[who], text) {
			n, err := people[who].Read(b)
			if err != nil {
				t.Fatalf("%v, waiting for %q in %q", err, text, shown[who])
			}
			shown[who] += string(b[:n])
		}
		before, after, _ := strings.Cut(shown[who], text)
		shown[who] = after
		return before
	}
	for _, who := range people { // before anything is asked
		fmt.Fprint(who, "\n\n\n\n\n\n\n")
	}
	until("screen", strings.Repeat("\r\n", 7))
	until("line", strings.Repeat("\r\n", 7))
	done := make(chan error, 1)
	go func() { done <- v.share(t.Context(), "key", Recovery{[]string{"甲", "乙", "丙"}, 2}) }()
	const secret = "印鉴 密钥份额"
	for i, at := range []string{"line", "screen", "line"} {
		other := map[string]string{"line": "screen", "screen": "line"}[at]
		prompt := fmt.Sprintf("RECOVERY SHARE %d", i+1)
		if both := until(at, prompt) + until(other, prompt); strings.Contains(both, secret) {
			t.Errorf("before share %d: %q", i+1, both)
		}
		if both := until(at, "press Enter") + until(other, "press Enter"); strings.Contains(both, secret) {
			t.Errorf("share %d is shown to nobody who asked: %q", i+1, both)
		}
		fmt.Fprint(people[at], "\n")
		if text := until(at, "written down"); !strings.Contains(text, secret) || strings.Contains(text, "\x1b[2J") {
			t.Errorf("share %d: %q", i+1, text)
		}
		fmt.Fprint(people[other], "\n\n") // moves nothing
		fmt.Fprint(people[at], "\n")
		until(at, "\x1b[2J")
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	v.con.say("the end")
	for who := range people {
		if text := until(who, "the end"); strings.Contains(text, secret) {
			t.Errorf("%s shows what it should not: %q", who, text)
		}
	}
}

// A screen and a serial line: both show the same, either answers, and a secret stands on none of them.
func TestTerminals(t *testing.T) {
	t.Parallel()
	screen, tty0 := pty(t)
	line, tty1 := pty(t)
	con := consoleOf(everywhere{tty0, tty1})
	shown := map[*os.File]*bytes.Buffer{screen: {}, line: {}}
	until := func(who *os.File, text string) {
		t.Helper()
		b := make([]byte, 4096)
		for !strings.Contains(shown[who].String(), text) {
			n, err := who.Read(b)
			if err != nil {
				t.Fatalf("%v, waiting for %q in %q", err, text, shown[who])
			}
			shown[who].Write(b[:n])
		}
	}
	for _, who := range []*os.File{line, screen} {
		con.say("who is there")
		until(screen, "who is there")
		until(line, "who is there")
		shown[screen].Reset()
		shown[line].Reset()
		fmt.Fprintf(who, "me\n")
		if got, err := con.line(); got != "me" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		until(who, "me") // what is typed is shown
	}
	answered := make(chan string)
	go func() {
		text, err := con.hidden("the secret")
		answered <- fmt.Sprint(text, err)
	}()
	until(screen, "the secret")
	fmt.Fprintf(screen, "open sesame\n")
	if got := <-answered; got != "open sesame<nil>" {
		t.Errorf("%q", got)
	}
	con.say("thank you")
	until(screen, "thank you")
	until(line, "thank you")
	for _, who := range []*os.File{screen, line} {
		if strings.Contains(shown[who].String(), "sesame") {
			t.Errorf("the secret was shown: %q", shown[who])
		}
	}
	fmt.Fprintf(line, "again\n")
	until(line, "again")
}
