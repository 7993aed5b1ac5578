package main

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"yinjian/appliance/pack"
	"yinjian/iso/layout"
)

// A target is the disk that is written. Drop forgets what memory holds of it, so that what is read next comes from the disk.
type target interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Drop() error
}

// A job is an installation: what was signed, the image's own description, and the bytes to be installed. Root is read
// through verity, ESP from the medium, packed by gzip: nothing checks it but its hash on the signed command line, which is of what it
// unpacks to.
type job struct {
	line   layout.CommandLine
	image  layout.Image
	root   io.ReaderAt
	esp    io.Reader
	parcel *parcel
}

// unpackESP reads the EFI system partition, of room bytes at most, and judges it before a byte of it is written.
func (j *job) unpackESP(room int64) ([]byte, error) {
	var esp []byte
	z, err := gzip.NewReader(j.esp)
	if err == nil {
		esp, err = io.ReadAll(io.LimitReader(z, room+1))
	}
	switch sum := sha256.Sum256(esp); {
	case int64(len(esp)) > room:
		return nil, errors.New("the medium's EFI system partition is larger than its place")
	case err != nil:
		return nil, fmt.Errorf("安装介质上的引导分区已损坏或读不出 (the medium's EFI system partition is damaged, or is not read): %w", err)
	case sum != j.line.ESP:
		return nil, errors.New("安装介质上的引导分区已被改动或损坏 (the medium's EFI system partition is not what was signed)")
	}
	return esp, nil
}

// write installs on a disk of size bytes with sectors of so many. The partition table comes last: whatever is cut off
// before leaves a disk that still counts as blank, if it was, and after it everything is there. All that was written is
// read back from the disk before the table is.
func (j *job) write(disk target, size, sector int64) error {
	var ids [3]layout.GUID
	var data layout.GUID
	for _, id := range []*layout.GUID{&ids[0], &ids[1], &ids[2], &data} {
		rand.Read(id[:])
		id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // RFC 9562 version 4
	}
	table, err := layout.NewTable(size, sector, j.image, j.line.Root, ids)
	if err != nil {
		return err
	}
	if _, err := table.AddData(data); err != nil {
		return err
	}
	at := func(number int) int64 { return table.Offset(table.Partitions[number-1]) }
	room := func(number int) int64 { return table.Size(table.Partitions[number-1]) }

	// 1. Nothing of a former installation is left where somebody could look for it: table, slot B, data.
	zeros := make([]byte, layout.Align)
	for _, place := range []int64{0, size - layout.Align, at(layout.NumberRootB), at(layout.NumberData)} {
		if _, err := disk.WriteAt(zeros, place); err != nil {
			return fmt.Errorf("clearing: %w", err)
		}
	}
	if err := disk.Sync(); err != nil {
		return err
	}

	// 2. The EFI system partition.
	esp, err := j.unpackESP(room(layout.NumberESP))
	if err != nil {
		return err
	}
	if _, err := disk.WriteAt(esp, at(layout.NumberESP)); err != nil {
		return fmt.Errorf("EFI system partition: %w", err)
	}

	// 3. The root: data as verity lets it through, superblock and tree computed anew. They come out as signed, or not at all.
	tree, err := layout.NewTree(j.line.Root.Algorithm, j.line.Root.Salt)
	if err != nil {
		return err
	}
	length := int64(j.line.Root.DataBlocks) * layout.BlockSize
	if _, err := io.Copy(io.NewOffsetWriter(disk, at(layout.NumberRootA)), io.TeeReader(io.NewSectionReader(j.root, 0, length), tree)); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	root, behind, err := tree.Sum()
	if err != nil {
		return err
	}
	if !bytes.Equal(root.Hash, j.line.Root.Hash) {
		return errors.New("安装介质上的系统已被改动或损坏 (the medium's root is not what was signed)")
	}
	if _, err := disk.WriteAt(behind, at(layout.NumberRootA)+length); err != nil {
		return fmt.Errorf("root: %w", err)
	}

	// 4. What the first start has to know, and to have.
	answers, err := j.parcel.encode()
	if err != nil {
		return err
	}
	if _, err := disk.WriteAt(answers, at(layout.NumberRootB)); err != nil {
		return fmt.Errorf("answers: %w", err)
	}

	for i, one := range j.parcel.Packs {
		if err := copyPack(io.NewOffsetWriter(disk, at(layout.NumberRootB)+j.parcel.offset(i)), one, j.parcel.packs[i]); err != nil {
			return err
		}
	}

	// 5. Read back.
	if err := errors.Join(disk.Sync(), disk.Drop()); err != nil {
		return err
	}
	if err := layout.Check(io.NewSectionReader(disk, at(layout.NumberRootA), room(layout.NumberRootA)), j.line.Root); err != nil {
		return fmt.Errorf("读回与写入不符，硬盘有故障 (what was written is not what is read): root: %w", err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(disk, at(layout.NumberESP), int64(len(esp)))); err != nil {
		return err
	}
	if !bytes.Equal(sum.Sum(nil), j.line.ESP[:]) {
		return errors.New("读回与写入不符，硬盘有故障 (what was written is not what is read): EFI system partition")
	}
	place := io.NewSectionReader(disk, at(layout.NumberRootB), room(layout.NumberRootB))
	back, err := readParcel(place)
	if err == nil {
		back.behind(place)
		for i, one := range back.Packs {
			err = errors.Join(err, copyPack(io.Discard, one, back.packs[i]))
			_, seek := back.packs[i].Seek(0, io.SeekStart)
			_, judged := pack.Whole(back.packs[i], j.parcel.keys) // the answer disk was read twice
			err = errors.Join(err, seek, judged)
		}
	}
	if err != nil {
		return fmt.Errorf("读回与写入不符，硬盘有故障 (what was written is not what is read): %w", err)
	}

	// 6. The table.
	return table.Write(disk, disk.Sync)
}
