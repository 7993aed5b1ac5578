package build

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A Section is one that a unified kernel image has beside those of its stub.
type Section struct {
	Name string // at most 8 bytes, with its dot
	Data []byte
}

// peFile is where the parts of a PE32+ file are (Microsoft PE/COFF, 2021; UEFI images are a subset).
type peFile struct {
	b        []byte
	header   int // of "PE\0\0"
	optional int // of the optional header
	table    int // of the section table
	sections int
}

var errPE = errors.New("build: this is no PE32+ file with room for what is added")

func parsePE(b []byte) (*peFile, error) {
	le := binary.LittleEndian
	if len(b) < 0x40 || string(b[:2]) != "MZ" {
		return nil, errPE
	}
	p := &peFile{b: b, header: int(le.Uint32(b[0x3c:]))}
	if p.header < 0x40 || p.header > len(b)-24 || string(b[p.header:p.header+4]) != "PE\x00\x00" {
		return nil, errPE
	}
	p.sections = int(le.Uint16(b[p.header+6:]))
	p.optional = p.header + 24
	size := int(le.Uint16(b[p.header+20:]))
	p.table = p.optional + size
	if size < 112+5*8 || p.table+p.sections*40 > len(b) || le.Uint16(b[p.optional:]) != 0x20b || le.Uint32(b[p.optional+108:]) < 5 {
		return nil, errPE
	}
	return p, nil
}

// addSections makes a unified kernel image of a stub. The file's time stamp is set to zero, so that the same parts give
// the same image; its checksum too, which UEFI does not look at.
func addSections(stub []byte, add []Section) ([]byte, error) {
	out := append([]byte(nil), stub...)
	p, err := parsePE(out)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	sectionAlign, fileAlign := int(le.Uint32(out[p.optional+32:])), int(le.Uint32(out[p.optional+36:]))
	if fileAlign == 0 || sectionAlign == 0 {
		return nil, errPE
	}
	up := func(n, to int) int { return (n + to - 1) / to * to }
	if p.table+(p.sections+len(add))*40 > int(le.Uint32(out[p.optional+60:])) {
		return nil, errPE // SizeOfHeaders: the first section begins there
	}
	// The stub asks for sections to be aligned to no more than it needs itself; pages are what firmware protects.
	align, end, fileEnd := max(sectionAlign, 4096), 0, 0
	for i := range p.sections {
		s := out[p.table+i*40:]
		if s[0] == '/' {
			return nil, errPE // a name in the table of strings, which is cut off below
		}
		end = max(end, int(le.Uint32(s[12:]))+int(le.Uint32(s[8:])), int(le.Uint32(s[12:]))+int(le.Uint32(s[16:])))
		fileEnd = max(fileEnd, int(le.Uint32(s[20:]))+int(le.Uint32(s[16:])))
	}
	// Symbols behind the last section would become a gap between sections, over which verifiers disagree (Authenticode
	// hashes sections; what lies between is in no part of its description).
	if fileEnd > len(out) {
		return nil, errPE
	}
	out = out[:fileEnd]
	clear(out[p.header+12 : p.header+20]) // PointerToSymbolTable, NumberOfSymbols
	for i, section := range add {
		if len(section.Name) > 8 {
			return nil, fmt.Errorf("build: section %s: the name is too long", section.Name)
		}
		at, file := up(end, align), up(len(out), fileAlign)
		raw := up(len(section.Data), fileAlign)
		s := out[p.table+(p.sections+i)*40:][:40]
		clear(s)
		copy(s, section.Name)
		le.PutUint32(s[8:], uint32(len(section.Data))) // VirtualSize: what the stub measures
		le.PutUint32(s[12:], uint32(at))
		le.PutUint32(s[16:], uint32(raw))
		le.PutUint32(s[20:], uint32(file))
		le.PutUint32(s[36:], 0x40000040) // initialised data, readable
		whole := make([]byte, file+raw)
		copy(whole, out)
		copy(whole[file:], section.Data)
		out = whole
		end = at + len(section.Data)
	}
	le.PutUint16(out[p.header+6:], uint16(p.sections+len(add)))
	le.PutUint32(out[p.header+8:], 0)                         // TimeDateStamp
	le.PutUint32(out[p.optional+56:], uint32(up(end, align))) // SizeOfImage
	le.PutUint32(out[p.optional+64:], 0)                      // CheckSum
	return out, nil
}
