package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/licensecheck"
)

// A part is a module that is built into a program that is handed out.
type part struct {
	Path, Version, Sum string
	Licences           []string // SPDX identifiers, sorted
	Files              []string // that say so
}

const licencesHead = `# 第三方软件 (third-party software)

由 ` + "`make docs`" + ` 生成，勿手工修改：编入 ` + "`yinjian`、`yinjian-verify`" + ` 的全部 Go 模块，许可证由其许可证文件的全文辨认(SPDX)。只在测试与生成文档时用到的不在其内。
Go 标准库以 BSD-3-Clause 发布。本程序以 [木兰宽松许可证第2版](../LICENSE) 发布。机器可读的清单(CycloneDX)由同一命令写到 ` + "`build/docs/sbom.cdx.json`" + `。
(Generated: the modules that are part of the programs, and their licences as their texts say.)

| 模块 module | 版本 | 许可证 | 许可证文件 |
| --- | --- | --- | --- |
`

func writeLicences(w io.Writer, root string) error {
	parts, err := productParts(root)
	if err != nil {
		return err
	}
	fmt.Fprint(w, licencesHead)
	for _, p := range parts {
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", p.Path, p.Version, strings.Join(p.Licences, ", "), strings.Join(p.Files, ", "))
	}
	return nil
}

// writeSBOM writes CycloneDX 1.6 as JSON, the same for the same sources: it has no serial number and no time.
func writeSBOM(w io.Writer, root string) error {
	parts, err := productParts(root)
	if err != nil {
		return err
	}
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Component: &cyclonedx.Component{Type: cyclonedx.ComponentTypeApplication, Name: "yinjian", BOMRef: "yinjian"}}
	var all []cyclonedx.Component
	var refs []string
	for _, p := range parts {
		purl := "pkg:golang/" + p.Path + "@" + p.Version
		var licences cyclonedx.Licenses
		for _, id := range p.Licences {
			licences = append(licences, cyclonedx.LicenseChoice{License: &cyclonedx.License{ID: id}})
		}
		all = append(all, cyclonedx.Component{
			Type: cyclonedx.ComponentTypeLibrary, BOMRef: purl, PackageURL: purl, Name: p.Path, Version: p.Version, Licenses: &licences,
			Properties: &[]cyclonedx.Property{{Name: "go:sum", Value: p.Sum}},
		})
		refs = append(refs, purl)
	}
	bom.Components = &all
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: "yinjian", Dependencies: &refs}}
	e := cyclonedx.NewBOMEncoder(w, cyclonedx.BOMFileFormatJSON)
	return e.SetPretty(true).EncodeVersion(bom, cyclonedx.SpecVersion1_6)
}

// productParts is every module that either program has a package of, by path. Their sources have to be in the module
// cache; a module whose licence cannot be told is an error.
func productParts(root string) ([]part, error) {
	c := exec.Command("go", "list", "-deps", "-json=Module", "./appliance/cmd/yinjian", "./appliance/cmd/yinjian-verify")
	c.Dir, c.Stderr = root, os.Stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	parts := map[string]*part{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			Module *struct {
				Path, Version, Sum, Dir string
				Main                    bool
			}
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		m := p.Module
		if m == nil || m.Main || parts[m.Path] != nil {
			continue
		}
		one := &part{Path: m.Path, Version: m.Version, Sum: m.Sum}
		if one.Licences, one.Files, err = licencesOf(m.Dir); err != nil {
			return nil, fmt.Errorf("%s: %w", m.Path, err)
		}
		parts[m.Path] = one
	}
	var all []part
	for _, p := range parts {
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b part) int { return cmp.Compare(a.Path, b.Path) })
	return all, nil
}

// licencesOf reads the files at a module's top that are named as licences are.
func licencesOf(dir string) (ids, files []string, err error) {
	all, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range all {
		name := strings.ToUpper(f.Name())
		if f.IsDir() || !strings.HasPrefix(name, "LICEN") && !strings.HasPrefix(name, "COPYING") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return nil, nil, err
		}
		found := licensecheck.Scan(text)
		for _, m := range found.Match {
			ids = append(ids, m.ID)
		}
		if len(found.Match) > 0 {
			files = append(files, f.Name())
		}
	}
	if len(ids) == 0 {
		return nil, nil, errors.New("no licence that can be told at the top of the module")
	}
	slices.Sort(ids)
	return slices.Compact(ids), files, nil
}
