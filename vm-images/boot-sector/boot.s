# A guest in one sector. On every BIOS disk it finds, the one it was booted from first:
#
#   sector 1           prints the text that is there, up to a zero byte
#   sector 2           counts the starts (its first 16 bits, little-endian)
#   sectors 1000-1007  writes a known text all over them, reads it back, compares
#
# All it says goes to the first serial port, a line each, beginning "boot-sector: ". At the end it powers
# off if bit 0 of `flags` is set, else halts.

.intel_syntax noprefix
.code16
.global _start

.equ COM1, 0x3f8
.equ ACPI_CONTROL, 0x604        # PM1a of QEMU's pc and q35, where SeaBIOS puts it
.equ ACPI_SLEEP_S5, 0x2000
.equ BIOS_DISKS, 0x475          # BIOS data area: how many hard disks there are
.equ WRITTEN, 0x8000            # memory: what is to be written
.equ READ, 0xa000               # memory: what was read
.equ SECTORS, 8
.equ FIRST, 1000

_start:
    ljmp 0, offset start
start:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    cld

    mov di, WRITTEN             # the known text, again and again; the source overtakes itself
    mov cx, offset MARKER_LENGTH
    mov si, offset marker
    rep movsb
    mov si, WRITTEN
    mov cx, SECTORS * 512
    rep movsb

    mov si, offset hello
    call say
    mov dl, 0x80
next_disk:
    call exercise
    inc dl
    mov al, dl
    sub al, 0x80
    cmp al, [BIOS_DISKS]
    jb next_disk

    mov si, offset done
    call say
    test byte ptr [flags], 1
    jz halt
    mov dx, ACPI_CONTROL
    mov ax, ACPI_SLEEP_S5
    out dx, ax
halt:
    cli
    hlt
    jmp halt

# Disk DL: all there is to do with it.
exercise:
    mov bx, 1                   # its text
    mov cx, 1
    mov ah, 0x42
    call transfer
    call say_disk
    mov si, READ
    call print
    call end_line

    inc bx                      # its counter
    mov ah, 0x42
    call transfer
    inc word ptr [READ]
    mov ax, [READ]
    push ax
    mov ah, 0x43
    call transfer
    call say_disk
    mov si, offset start_number
    call print
    pop ax
    call print_number
    call end_line

    mov bx, FIRST               # the known text
    mov cx, SECTORS
    mov word ptr [packet_memory], WRITTEN
    mov ah, 0x43
    call transfer
    mov word ptr [packet_memory], READ
    call say_disk
    mov si, offset wrote
    call print
    mov ah, 0x42
    call transfer
    mov si, WRITTEN
    mov di, READ
    mov cx, SECTORS * 256
    repe cmpsw
    jne failed
    call say_disk
    mov si, offset verified
    jmp print

# CX sectors from BX on of disk DL, to or from memory; AH is 42h to read, 43h to write (INT 13h extensions).
transfer:
    mov [packet_count], cx
    mov [packet_sector], bx
    mov al, 0
    mov si, offset packet
    int 0x13
    jc failed
    ret

failed:
    call say_disk
    mov si, offset error
    call print
    jmp halt

# Begin a line: who speaks, and of which disk.
say_disk:
    mov si, offset disk
    call say
    mov al, dl
    sub al, 0x80 - '0'
    call put
    mov si, offset colon
    jmp print

end_line:
    mov si, offset newline
    jmp print

# Begin a line with the text at SI.
say:
    push si
    mov si, offset prefix
    call print
    pop si
# The text at SI, up to a zero byte.
print:
    lodsb
    test al, al
    jz 1f
    call put
    jmp print
1:  ret

# AX in decimal.
print_number:
    push dx
    xor dx, dx
    mov cx, 10
    div cx
    test ax, ax
    jz 1f
    push dx
    call print_number
    pop dx
1:  mov al, dl
    add al, '0'
    pop dx
# The character AL, to the serial port.
put:
    push dx
    push ax
    mov dx, COM1 + 5
1:  in al, dx
    test al, 0x20               # is there room?
    jz 1b
    pop ax
    mov dx, COM1
    out dx, al
    pop dx
    ret

prefix:         .asciz "boot-sector: "
hello:          .asciz "hello\n"
disk:           .asciz "disk "
colon:          .asciz ": "
start_number:   .asciz "start "
wrote:          .asciz "wrote 8 sectors, ok\n"
verified:       .asciz "verified 8 sectors, ok\n"
error:          .asciz "FAILED"
done:           .ascii "done"
newline:        .asciz "\n"
marker:         .ascii "virt-sse boot-sector marker: not to be found in the raw image. "
.equ MARKER_LENGTH, . - marker

.balign 4
packet:                         # the disk address packet of INT 13h
                .byte 16, 0
packet_count:   .word 0
packet_memory:  .word READ, 0
packet_sector:  .quad 0

.org 509
flags:          .byte 1
                .word 0xaa55

# Sector 1.
                .asciz "greetings from sector 1"
.org 1024
