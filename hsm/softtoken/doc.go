// Package softtoken is the software cipher machine (密码机): a daemon that holds the keys and a PKCS#11 module (folder
// module, in C) through which programs reach it. It is for evaluation only and not a certified product, and says so
// in CK_TOKEN_INFO, in CK_SLOT_INFO, in CK_INFO and in its log.
//
// It implements PKCS#11 v2.40 (OASIS, base specification and current mechanisms), SM2 (GB/T 32918-2016, GM/T
// 0003-2012; ciphertexts C1 ‖ C3 ‖ C2 and SM2Cipher of GM/T 0009-2012), SM3 (GB/T 32905-2016), HMAC-SM3, SM4 (GB/T
// 32907-2016) in ECB, CBC, GCM and CMAC (GB/T 15852.1-2020 MAC algorithm 5), RSASSA-PKCS1-v1_5 and RSASSA-PSS (RFC 8017
// §8) and PBKDF2 (RFC 8018 §5.2). CBC-MAC is not offered: for messages of several lengths it can be forged. What is left to others: initialising tokens is done through PKCS#11 like everything else;
// supervising the daemon is the service manager's work.
//
// # Keys
//
// Private and secret keys are private and sensitive: none is read. What is extractable leaves wrapped (C_WrapKey) under an
// SM4 key with CKA_WRAP: a secret key as its value, a private key as PKCS#8. Where PKCS#11 leaves a choice, or this token
// is stricter than it:
//
//   - An SM4 key is for data, for MACs or for keys; a template that mixes them is CKR_TEMPLATE_INCONSISTENT. Without a
//     template it is for data. An SM2 private key that decrypts does not sign unless its template says so.
//   - C_SetAttributeValue and C_CopyObject protect more and never less, uses of a key included. Private keys are not
//     copied, since a copy would sign beside the count of uses, nor are keys that wrap or unwrap.
//   - The security officer sees, of private objects, the keys with CKA_WRAP, and may do one thing with them: set
//     CKA_TRUSTED. The key must not be extractable; whether it ever was, or came from outside, CKA_NEVER_EXTRACTABLE and
//     CKA_LOCAL tell him. The user may take the mark away.
//   - An unwrapped key is not extractable unless the template says so; under a trusted key it is then
//     CKA_WRAP_WITH_TRUSTED too.
//   - SM4-GCM is the mechanism to wrap with: it finds out an altered or exchanged key, and the token draws the nonce. Its
//     CK_GCM_PARAMS must have no IV; the wrapped key is nonce (12) ‖ ciphertext ‖ tag (16). SM4-CBC with padding is there
//     because vendors have it: what it unwraps may have been altered, and who may try often learns from the refusals.
//     A key wrapped with either says nothing of its attributes: they are those of the template it is unwrapped with.
//   - For C_Encrypt with SM4-GCM the caller brings the IV, and must not bring one twice. In parts, GCM gives its result at
//     the end, plaintexts after the tag was checked, and takes a megabyte.
//   - Signatures are counted for each private key, those of session objects, unwrapped ones among them, for as long as
//     the object lives. Decryption is not counted. An extractable key may exist elsewhere, where nothing counts.
//
// # Wire protocol
//
// A unix stream socket, mode 0600. The peer's uid (SO_PEERCRED) must be the daemon's own or root. The module makes
// one connection at C_Initialize (control) and one for each session; a session lives and dies with its connection,
// so no session handle crosses the wire. For modules on other machines the same runs over TCP, inside TLS 1.3 (RFC 8446)
// in which both sides show the very certificates that the daemon made when it first listened there (link-server.pem,
// link-client.pem); who has the latter counts as a process of the daemon's user, and all of them as one. All integers are big-endian, except inside attribute values, which are the
// raw bytes PKCS#11 has in memory (CK_ULONG: 8 bytes, native order).
//
//	hello    "YJP1" (4) | application id (16)              answered with a reply without results
//	request  u32 length | u32 call | arguments             length counts what follows it, at most 1 MiB
//	reply    u32 length | u64 CK_RV | results              results only when CK_RV is CKR_OK
//
// The application id is 16 random bytes drawn by C_Initialize. The first connection binds it to that peer's pid and
// uid; a connection from another process that presents it is refused with CKR_FUNCTION_REJECTED. An application ends
// with its last connection. Login state and object handles belong to an application and a slot.
//
// Arguments are written one after the other, in the shapes of the call's row in the table calls:
//
//	q  u64
//	s  u32 length | bytes
//	A  u32 count | count × (u64 type | u32 length | value)          a template
//	T  u32 count | count × u64                                      attribute types
//	M  u64 mechanism | u32 length | parameter                       length 0: no parameter
//
// CK_GCM_PARAMS, which holds pointers, is written u32 length | IV | u32 length | AAD | u64 tag bits. Results are written
// in the same way; of a call that fills the caller's buffer (C_Encrypt and its like, C_WrapKey) the last argument is the
// room in it, CK_UNAVAILABLE_INFORMATION when only its length is asked for, and the results u8 1 | s, or u8 0 | u64 room
// that is needed; then nothing has happened. Bytes left over, counts above 256 and unknown shapes end the connection. The first byte of a
// request may be awaited for ever; the rest must follow within ten seconds, and a reply must be taken within ten to
// twenty. There are at most 4096 connections, of one process 2048; more are answered CKR_SESSION_COUNT. Beside them 256
// of the network may be at their handshake, which must end within ten seconds; others wait. Two key pairs
// are made at a time, others wait. All peers are of one user, so these limits contain mistakes and not malice: who may
// connect may also create objects until the disk is full, and enter wrong PINs until the token is locked.
//
// # Sealing at rest
//
//	store.rec               the store key, sealed under the passphrase
//	slot-N/token.rec        label, serial, PIN verifiers, the wrapped token key
//	slot-N/SERIAL/pins.rec  how often a wrong PIN was entered since the last right one
//	slot-N/SERIAL/ID.obj    one object, or the two objects of a key pair
//	slot-N/SERIAL/uses.cnt  how often each private key has signed; not sealed
//	link-server.pem         key and certificate for the network, where it listens there; not sealed
//	link-client.pem         what a module on another machine needs: its key and certificate, ours; not sealed
//	lock                    flock of the daemon that uses the folder
//
// Sealing is SM4-GCM with a random 96-bit nonce and a 128-bit tag. Keys:
//
//	passphrase key   PBKDF2-HMAC-SM3(passphrase, salt, iterations), computed once at start and dropped
//	store key        32 random bytes in store.rec; seals every record (outer seal)
//	PIN key          PBKDF2-HMAC-SM3(PIN, salt, iterations), one for the user's, one for the security officer's
//	token key        16 random bytes per token; seals private objects (inner seal). Two copies, wrapped under the
//	                 user's and the security officer's PIN key, stand in token.rec
//
// From each derived or random key K, K' = HMAC-SM3(K, purpose) is what is used, truncated to 16 bytes for SM4. The
// PIN verifier is HMAC-SM3(PIN key, "verifier"). A sealed record is
//
//	"YJTK" | u8 version 1 | u8 kind | nonce (12) | ciphertext | tag (16)
//
// with additional data "yinjian softtoken record" | u8 version | u8 kind | u64 slot | serial (16) | id (16) | u8 item,
// so that no record can stand in another's place, slot or token. store.rec carries u32 iterations | salt (32) before
// the nonce, and its additional data are all bytes before the nonce. A private object is sealed twice: it is opened
// only after the user or the security officer has logged in, and its key is wiped
// when the last application logs out of the slot and when the daemon stops.
//
// A file is written under a temporary name, synced, renamed, and its folder synced. A key pair is one file, so that a
// power cut leaves both halves or none. C_InitToken commits by renaming token.rec, which names the SERIAL folder in
// use; other folders are remains and are removed. The PIN counter is on disk before a PIN is compared. Before each
// change the folder's lock file must be the one that was locked: a folder that was moved away, or replaced, is not
// written to.
//
// What sealing cannot see: an attacker with write access to the folder can delete an object's file, or put back an
// older state of it (the counter of wrong PINs included). Who holds the folder and the passphrase file holds all
// public objects and may guess PINs as fast as PBKDF2 lets him. The libraries that compute keep copies of key
// material which are freed and not overwritten. These are limits of software, and reasons for a real cipher machine.
package softtoken
