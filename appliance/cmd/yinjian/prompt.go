package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"yinjian/appliance"
)

var errInterrupted = errors.New("已中断 (interrupted)")

func onTerminal() bool { return term.IsTerminal(int(os.Stdin.Fd())) }

// typed asks for a secret on the terminal, which does not show it. When ctx ends the terminal is as it was.
func typed(ctx context.Context, prompt string) ([]byte, error) {
	fd := int(os.Stdin.Fd())
	was, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	type line struct {
		text []byte
		err  error
	}
	got := make(chan line, 1)
	// Silent before it asks: ReadPassword turns the echo off only when it begins to read, and quick fingers are quicker.
	silent, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	silent.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, silent); err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%s: ", prompt)
	go func() { // a read of a terminal cannot be called off; the process ends soon
		b, err := term.ReadPassword(fd)
		got <- line{b, err}
	}()
	select {
	case l := <-got:
		fmt.Fprintln(os.Stderr)
		return l.text, errors.Join(l.err, term.Restore(fd, was))
	case <-ctx.Done():
		fmt.Fprintln(os.Stderr)
		return nil, errors.Join(errInterrupted, term.Restore(fd, was))
	}
}

// typedTwice asks for a new secret, until check takes it and it is the same twice.
func typedTwice(ctx context.Context, who string, check func([]byte) error) ([]byte, error) {
	for {
		p, err := typed(ctx, who)
		if err != nil {
			return nil, err
		}
		if err := check(p); err != nil {
			fmt.Fprintf(os.Stderr, "  ✗ %v\n", err)
			continue
		}
		again, err := typed(ctx, who+" 再输一次 (again)")
		if err != nil {
			return nil, err
		}
		if bytes.Equal(p, again) {
			return p, nil
		}
		fmt.Fprintln(os.Stderr, "  ✗ 两次不同 (they differ)")
	}
}

// secretOf reads a secret from its file, or, where no file is named, from the terminal; a new one is asked for twice. flag
// names the file's flag. The caller wipes it.
func secretOf(ctx context.Context, file, flag, who string, fresh bool) ([]byte, error) {
	switch {
	case file != "":
		return appliance.ReadSecret(file)
	case !onTerminal():
		return nil, usageError{fmt.Errorf("标准输入不是终端：给出 --%s (standard input is no terminal: give --%s)", flag, flag)}
	case fresh:
		return typedTwice(ctx, who, notEmpty)
	}
	p, err := typed(ctx, who)
	if err == nil {
		err = notEmpty(p)
	}
	return p, err
}

func notEmpty(p []byte) error {
	if len(p) == 0 {
		return errors.New("空的 (empty)")
	}
	return nil
}

// An interruptible is a reader whose reads end with ctx.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i interruptible) Read(p []byte) (int, error) {
	type piece struct {
		b   []byte
		err error
	}
	got := make(chan piece, 1)
	go func() { // as in typed
		b := make([]byte, len(p))
		n, err := i.r.Read(b)
		got <- piece{b[:n], err}
	}()
	select {
	case g := <-got:
		return copy(p, g.b), g.err
	case <-i.ctx.Done():
		return 0, errInterrupted
	}
}
