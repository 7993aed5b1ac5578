package api

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"yinjian/appliance/problem"
)

var (
	signerID      = regexp.MustCompile(`^[A-Za-z0-9-]{2,32}$`)
	applicationID = regexp.MustCompile(`^[a-z0-9-]{2,32}$`)
	machineName   = regexp.MustCompile(`^[a-z][a-z0-9_]{0,30}$`)
	recordID      = regexp.MustCompile(`^[0-9a-f]{64}$`)
	grantID       = regexp.MustCompile(`^[0-9a-f]{32}$`)
	serialNumber  = regexp.MustCompile(`^[0-9a-f]{1,40}$`) // RFC 5280 §4.1.2.2: at most 20 octets
	anchorID      = regexp.MustCompile(`^[0-9a-fA-F]{8,64}$`)
	keyOwner      = regexp.MustCompile(`^(signer:[A-Za-z0-9-]{2,32}(/(SM2|RSA-2048))?|tsa:[a-z0-9][a-z0-9-]{0,30}|log|tls)$`)
	unitName      = regexp.MustCompile(`^[A-Za-z0-9._-]{1,32}$`)
	visibleASCII  = regexp.MustCompile(`^[\x21-\x7e]{1,128}$`)
)

// first answers the first fault of the fields in the order given.
func first(faults ...*problem.Problem) *problem.Problem {
	for _, p := range faults {
		if p != nil {
			return p
		}
	}
	return nil
}

func missing(field string) *problem.Problem {
	return problem.Invalid(field, "缺少必填字段 (required field missing)")
}

// text is [problem.CheckText], the rule that the services have for what will be read as evidence.
func text(field, s string, most int) *problem.Problem {
	if s == "" {
		return missing(field)
	}
	var p *problem.Problem
	errors.As(problem.CheckText(field, s, most), &p) // it answers no other error
	return p
}

// textOrNone is text where none may be given.
func textOrNone(field, s string, most int) *problem.Problem {
	if s == "" {
		return nil
	}
	return text(field, s, most)
}

// timeOrNone wants a time as RFC 3339 has it, if one is given.
func timeOrNone(field, s string) *problem.Problem {
	if _, err := time.Parse(time.RFC3339, s); s != "" && err != nil {
		return problem.Invalid(field, "须为 RFC 3339 时间 (a time as RFC 3339 has it)")
	}
	return nil
}

func pattern(field, s string, re *regexp.Regexp) *problem.Problem {
	switch {
	case s == "":
		return missing(field)
	case !re.MatchString(s):
		return problem.Invalid(field, "格式应为 %s (want this form)", re)
	}
	return nil
}

func oneOf(field, s string, allowed ...string) *problem.Problem {
	switch {
	case s == "":
		return missing(field)
	case !slices.Contains(allowed, s):
		return problem.Invalid(field, "只能取 %s (want one of these)", strings.Join(allowed, "、"))
	}
	return nil
}

func number(field string, n, least, most int) *problem.Problem {
	if n < least || n > most {
		return problem.Invalid(field, "应在 %d 与 %d 之间 (want %d to %d)", least, most, least, most)
	}
	return nil
}

// blob wants 1 to most bytes when given; nil is not given.
func blob(field string, b []byte, most int) *problem.Problem {
	switch {
	case b == nil:
		return nil
	case len(b) == 0:
		return problem.Invalid(field, "不能为空 (must not be empty)")
	case len(b) > most:
		return problem.Invalid(field, "超过 %d 字节 (longer than %d bytes)", most, most)
	}
	return nil
}

func required(field string, b []byte, most int) *problem.Problem {
	if b == nil {
		return missing(field)
	}
	return blob(field, b, most)
}
