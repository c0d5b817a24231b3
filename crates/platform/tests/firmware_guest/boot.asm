; Boot sector of the guest of the image tests: long mode with a few mappings,
; a signal at 0x7000, then halt. Assembled with `nasm -f bin boot.asm -o boot.bin`.
org 0x7c00
bits 16
start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    mov ax, 0x1000          ; tables at 0x10000
    mov es, ax
    xor di, di
    xor ax, ax
    mov cx, 0x2000
    rep stosw               ; 16 KiB of zeros
    mov word [es:0x0000], 0x1003    ; PML4[0] -> PDPT 0x11000
    mov byte [es:0x0002], 0x01
    mov word [es:0x0ff8], 0x1003    ; PML4[511] -> the same
    mov byte [es:0x0ffa], 0x01
    mov word [es:0x1000], 0x2003    ; PDPT[0] -> PD 0x12000
    mov byte [es:0x1002], 0x01
    mov word [es:0x1ff0], 0x2003    ; PDPT[510] -> the same
    mov byte [es:0x1ff2], 0x01
    mov word [es:0x2000], 0x0083    ; PD[0]: 2 MiB page at 0
    mov word [es:0x2008], 0x0083    ; PD[1]: 2 MiB page at 0x200000
    mov byte [es:0x200a], 0x20
    mov word [es:0x2010], 0x3003    ; PD[2] -> PT 0x13000
    mov byte [es:0x2012], 0x01
    mov word [es:0x3000], 0x5003    ; PT[0]: page 0x5000
    mov word [es:0x3010], 0x9003    ; PT[2]: page 0x9000
    mov word [es:0x3018], 0xa003    ; PT[3]: page 0xa000
    lgdt [gdt_pointer]
    mov eax, 0x20           ; CR4.PAE
    mov cr4, eax
    mov eax, 0x10000
    mov cr3, eax
    mov ecx, 0xc0000080     ; EFER.LME
    rdmsr
    or ah, 1
    wrmsr
    mov eax, 0x80000001     ; CR0.PG, PE
    mov cr0, eax
    jmp 8:long_mode
bits 64
long_mode:
    mov ecx, 0xc0000102     ; KERNEL_GS_BASE = 0xffff888012345000
    mov eax, 0x12345000
    mov edx, 0xffff8880
    wrmsr
    mov rax, 0x34364e4f4d434553   ; "SECMON64"
    mov [0x7000], rax
halt:
    hlt
    jmp halt
align 8
gdt:
    dq 0
    dq 0x00209a0000000000
gdt_pointer:
    dw 15
    dd gdt
times 510-($-$$) db 0
    dw 0xaa55
