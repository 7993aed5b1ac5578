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
// unpacks to. It is read twice.
type job struct {
	line   layout.CommandLine
	image  layout.Image
	root   io.ReaderAt
	esp    io.ReadSeeker
	parcel *parcel
}

// unpackESP unpacks the EFI system partition to w, room bytes at most, and answers how many they are; an error where they are not
// what was signed.
func (j *job) unpackESP(w io.Writer, room int64) (int64, error) {
	if _, err := j.esp.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	z, err := gzip.NewReader(j.esp)
	if err != nil {
		return 0, unreadable{err}
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(sum, w), unread{io.LimitReader(z, room)})
	if err != nil {
		return 0, fmt.Errorf("EFI system partition: %w", err)
	}
	if more, _ := io.ReadFull(z, make([]byte, 1)); more > 0 {
		return 0, errors.New("the medium's EFI system partition is larger than its place")
	}
	if !bytes.Equal(sum.Sum(nil), j.line.ESP[:]) {
		return 0, errors.New("安装介质上的引导分区已被改动或损坏 (the medium's EFI system partition is not what was signed)")
	}
	return n, nil
}

// unread is a reader of the medium, whose errors are [unreadable].
type unread struct{ io.Reader }

func (u unread) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = unreadable{err}
	}
	return n, err
}

type unreadable struct{ error }

func (u unreadable) Error() string {
	return "安装介质上的引导分区已损坏或读不出 (the medium's EFI system partition is damaged, or is not read): " + u.error.Error()
}

// clearing puts zeros at a disk's start and end, and at the other places, a MiB each.
func clearing(disk target, sector, size int64, places ...int64) error {
	mark := make([]byte, sector)
	copy(mark, layout.ClearingMark)
	if _, err := disk.WriteAt(mark, 0); err != nil {
		return err
	}
	if err := disk.Sync(); err != nil {
		return err
	}
	zeros := make([]byte, layout.Align)
	for _, place := range append(places, size-layout.Align) {
		if _, err := disk.WriteAt(zeros, place); err != nil {
			return err
		}
	}
	if _, err := disk.WriteAt(zeros[sector:], sector); err != nil {
		return err
	}
	if err := disk.Sync(); err != nil {
		return err
	}
	if _, err := disk.WriteAt(zeros[:sector], 0); err != nil {
		return err
	}
	return disk.Sync()
}

// write installs on a disk of size bytes with sectors of so many. The partition table comes last: whatever is cut off
// before leaves a disk that counts as blank, or as it was found, and after it everything is there. All that was written is
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

	// 1. What the medium holds is judged before anything of the disk is lost; the root was, by init.
	if _, err := j.unpackESP(io.Discard, room(layout.NumberESP)); err != nil {
		return err
	}

	// 2. Nothing of a former installation is left where somebody could look for it: table, slot B, data. The first sector says
	// meanwhile what is going on, so that a disk which is half cleared goes on without another token.
	if err := clearing(disk, sector, size, at(layout.NumberRootB), at(layout.NumberData)); err != nil {
		return fmt.Errorf("clearing: %w", err)
	}

	// 3. The EFI system partition.
	espLen, err := j.unpackESP(io.NewOffsetWriter(disk, at(layout.NumberESP)), room(layout.NumberESP))
	if err != nil {
		return err
	}

	// 4. The root: data as verity lets it through, superblock and tree computed anew. They come out as signed, or not at all.
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

	// 5. What the first start has to know, and to have.
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

	// 6. Read back.
	if err := errors.Join(disk.Sync(), disk.Drop()); err != nil {
		return err
	}
	if err := layout.Check(io.NewSectionReader(disk, at(layout.NumberRootA), room(layout.NumberRootA)), j.line.Root); err != nil {
		return fmt.Errorf("读回与写入不符，硬盘有故障 (what was written is not what is read): root: %w", err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(disk, at(layout.NumberESP), espLen)); err != nil {
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

	// 7. The table.
	return table.Write(disk, disk.Sync)
}
